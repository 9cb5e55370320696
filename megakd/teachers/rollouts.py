"""The prompts, files and training batches of generated texts, whoever generates them.

rollouts/<stage>/step-00000012.jsonl     a line with the number of texts, then a line per text
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Generator as Iteration
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from megakd.config.run import RunConfig
from megakd.config.sections import RolloutConfig, TextsConfig, rollout_block
from megakd.config.task import file_of_step
from megakd.data.arrow import column_of
from megakd.data.batch import IGNORE, ROUTE, Batch, BatchSource
from megakd.data.chat_tokens import PROMPT_LENGTH
from megakd.data.collation import Collator
from megakd.data.encoding import Encoded
from megakd.data.loader import (
    RowOrder,
    StepLayout,
    StepLoader,
    collate_step,
    lengths_of_rows,
    prompt_lengths,
    rows_with_targets,
)
from megakd.engine.collectives import activity, gather, on_main
from megakd.errors import ConfigError, DataError
from megakd.models.architectures import context_length
from megakd.models.fitting import ModelSource
from megakd.models.generation import TOKENS_PER_TEXT, TRUNCATED, Generator
from megakd.process.files import write_text

logger = logging.getLogger(__name__)


class Rollout(NamedTuple):
    """One generated text, as it is written before the student learns from it.

    row: number of the training row whose prompt was continued.
    completion, finished: as in `Completion`.
    version: number of updates of the student that generated the text.
    seed: seed of the text.
    """

    row: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    finished: bool
    version: int
    seed: int


def columns_of(texts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """Return texts as columns of training rows whose completions are the targets."""
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for text in texts:
        ids = np.array(text.prompt + text.completion, dtype=np.int32)
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        first = len(text.prompt) - 1  # the position that predicts the first generated token
        labels[first:-1] = ids[first + 1 :]
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
    return columns


class Prompts:
    """The rows of a split and the prompts in them.

    lengths: [N] tokens of every prompt; 0: the row has no prompt. Rows without a column
        `prompt_length` begin with `prompt_tokens` of prompt.
    continued: numbers of the rows whose prompt, of at most `most` tokens, a generator continues.
    answers: number of rows that can be learned from as they are.
    routes: [N] numbers of the teachers that the rows name; None if the rows name no teachers.
    row_length: tokens at which longer rows were cut; None: no row was cut.
    """

    def __init__(
        self,
        rows: Dataset,
        *,
        prompt_tokens: int | None,
        most: int,
        key: str = "rollout",
        row_length: int | None = None,
    ) -> None:
        has_prompts = PROMPT_LENGTH in rows.column_names
        if has_prompts and prompt_tokens is not None:
            raise DataError(
                f"{key}.prompt_tokens: {prompt_tokens} applies to plain text, and the rows have "
                "prompts of their own; remove the key"
            )
        if not has_prompts and prompt_tokens is None:
            raise DataError(
                f"{key}: the rows have no prompts; use rows with messages, with prompt and "
                f"completion, or with prompt, or set {key}.prompt_tokens to the number of tokens "
                "at the beginning of each row that are continued"
            )
        self._rows: Any = rows.with_format("numpy")  # whose rows are mappings
        self.lengths = (prompt_lengths if has_prompts else lengths_of_rows)(rows)
        if prompt_tokens is not None:
            self.lengths = self.lengths.clip(max=prompt_tokens)
        self.continued = np.flatnonzero((self.lengths > 0) & (self.lengths <= most))
        self.answers = len(rows_with_targets(rows))
        self.routes = column_of(rows, ROUTE) if ROUTE in rows.column_names else None
        self.row_length = row_length

    def prompt(self, row: int) -> tuple[int, ...]:
        """Return the tokens of a row that a generator continues; at least one token."""
        ids = np.asarray(self._rows[int(row)]["input_ids"])
        return tuple(ids[: self.lengths[row]].tolist())

    def row(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the tokens and the labels of a row, both [T]."""
        record = self._rows[int(row)]
        return np.asarray(record["input_ids"]), np.asarray(record["labels"])


def check_generated_texts(config: RunConfig, encoded: Encoded, student: ModelSource) -> None:
    """Check and log which rows `rollout` and `eval.generation` use, and that rows have answers."""
    rollouts, generation = config.rollout, config.eval.generation
    if rollouts is None:
        _check_answers(encoded)
    if rollouts is not None and encoded.stream is None:
        prompts = prompts_of(encoded.train, rollouts, config, student)
        _say("rollout", prompts)
        uses = {
            f"rollout.mix ({rollouts.mix:g})": rollouts.mix < 1,
            f"rollout.from_step ({rollouts.from_step})": rollouts.from_step,
            f"method.name ({config.method.name})": config.method.cuts_student,
            "baselines": config.trained_baselines,
            "finetune": any(spec.finetune for spec in config.teacher_specs.values()),
        }
        if not prompts.answers and any(uses.values()):
            raise ConfigError(
                f"{', '.join(key for key, does in uses.items() if does)}: learns from the data, "
                "and all training rows are prompts without an answer; give the answers in a column "
                "completion (task.completion_column), or train on generated texts alone"
            )
    if generation is not None:
        key = "eval.generation"
        _say(key, prompts_of(encoded.validation, generation, config, student, key=key))


def _check_answers(encoded: Encoded) -> None:
    # Each source of a mixture must have answers too.
    names = [
        name.partition("/")[2]
        for name, part in (encoded.chat or {}).items()
        if name.partition("/")[0] == "train" and part.kept and not part.targets
    ]
    if encoded.stream is not None and encoded.stream.texts.kind.has_prompts_alone:
        names.append("")
    if names:
        source = f" of task.mixture.{names[0]}" if names[0] else ""
        raise DataError(
            f"the training rows{source} are prompts without an "
            "answer, so that nothing can be learned; give the answers in a column completion "
            "(task.completion_column), or let the section rollout generate them"
        )


def prompts_of(
    rows: Dataset,
    section: TextsConfig,
    config: RunConfig,
    student: ModelSource,
    *,
    key: str = "rollout",
) -> Prompts:
    """Return the prompts of encoded rows; those that leave room for the longest text are continued.

    The room is `task.max_length`, or the context of the student if it is smaller. `section` of the
    config, named `key`, asks for the texts.
    """
    room, limit, remedy = config.task.row_length, "task.max_length", "raise task.max_length"
    context = context_length(student.config)
    if context is not None and context < room:
        room, limit, remedy = context, f"the context of {student.where}", "shorten the prompts"
    most = room - section.max_new_tokens
    prompts = Prompts(
        rows,
        prompt_tokens=section.prompt_tokens,
        most=most,
        key=key,
        row_length=config.task.row_length,
    )
    if not len(prompts.continued):
        lengths = prompts.lengths[prompts.lengths > 0]
        shortest = lengths.min(initial=room)
        raise ConfigError(
            f"{key}.max_new_tokens: {section.max_new_tokens} leaves {most} tokens of {limit} "
            f"({room}) for the prompt, and none of the {len(lengths)} prompts in {len(rows)} rows "
            f"is that short (the shortest has {shortest}); set {key}.max_new_tokens to at most "
            f"{max(room - shortest, 1)}, or {remedy}"
        )
    return prompts


def _say(key: str, prompts: Prompts) -> None:
    rows, used, some = len(prompts.lengths), len(prompts.continued), (prompts.lengths > 0).sum()
    logger.log(
        logging.WARNING if used < rows else logging.INFO,
        "%s: %d of %d rows have a prompt that is continued; %d prompts leave no room for "
        "max_new_tokens, %d rows have no prompt, %d rows have no answer to learn from",
        key,
        *(used, rows, some - used, rows - some, rows - prompts.answers),
    )


def write_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write the texts of a step."""
    trees = [{"rollouts": len(rollouts)}, *(rollout._asdict() for rollout in rollouts)]
    write_text(path, "".join(json.dumps(tree, separators=(",", ":")) + "\n" for tree in trees))


def read_rollouts(path: Path) -> list[Rollout]:
    """Return the texts of a step as written; raise DataError if the file is not whole."""
    try:
        head, *trees = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        lists = [Rollout(**trees[number]) for number in range(head["rollouts"])]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} is not a complete file of rollouts ({type(error).__name__}: {error}); "
            "remove the file, and its texts are generated again"
        ) from error
    return [
        text._replace(prompt=tuple(text.prompt), completion=tuple(text.completion))
        for text in lists
    ]


_DRAW = 1
"""Keeps the random numbers of the draw apart from others of the same seed and step."""


@dataclass(kw_only=True)
class RolloutSource(BatchSource):
    """The batches of a stage of which some steps learn from texts that a model generates.

    Which steps is a function of (config, seed, step). Texts are written to disk before the student
    learns from them, and a resumed run reads them from disk.

    continued: the rows of each step that continues prompts; each leaves room for a text.
    data: the steps that use the data; None if no step does.
    folder: the files of the texts, which rank 0 alone uses.
    oldest: returns the first step from which the run may be resumed.
    waited_s: seconds that the loop has waited for batches, including the generation of texts.
    """

    config: RolloutConfig
    prompts: Prompts
    continued: RowOrder
    data: StepLoader | None
    collate: Collator
    layout: StepLayout
    generator: Generator
    folder: Path
    seed: int
    oldest: Callable[[], int]
    waited_s: float = 0.0
    _sums: Counter[str] = field(default_factory=Counter)  # over the texts since the last log
    _ahead: tuple[Sequence[int], Callable[[], None]] = (), lambda: None

    def __post_init__(self) -> None:
        used = [self.continued] if self.config.mix else []
        used += [] if self.data is None else [self.data.step_rows]
        self.steps_per_epoch = max(order.steps_per_epoch for order in used)

    def iterate(self, start: int, stop: int) -> Iteration[Sequence[Batch], None, None]:
        for step in range(start, stop):
            began, following = time.perf_counter(), step + 1
            batches = self.step(step)
            # A remote generator makes the next texts while the student learns.
            if self.config.works_ahead and self.config.from_step <= following < stop:
                block = rollout_block(following, self.config)
                if block[0] == following and not on_main(self._path(following).is_file):
                    self._ahead = block, self._requested(block, version=step)
            self.waited_s += time.perf_counter() - began
            yield batches

    def step(self, step: int) -> Sequence[Batch]:
        if self.data is not None and not learns_from_texts(self.config, step, seed=self.seed):
            return self.data.step(step)
        path = self._path(step)
        if not on_main(path.is_file):
            (steps, write), self._ahead = self._ahead, ((), lambda: None)
            if step not in steps:
                later = [at for at in rollout_block(step, self.config) if at >= step]
                write = self._requested(later, version=step)
            write()
        texts, routes = on_main(lambda: read_rollouts(path)), self.prompts.routes
        self._sums.update(
            texts=len(texts),
            tokens=sum(len(text.completion) for text in texts),
            finished=sum(text.finished for text in texts),
            staleness=sum(step - text.version for text in texts),
        )
        batches = collate_step(
            columns_of(texts),
            self.layout,
            self.collate,
            routes=None if routes is None else routes[[text.row for text in texts]],
        )
        return [batch._replace(is_rollout=True) for batch in batches]

    def scalars(self) -> dict[str, float]:
        sums, self._sums = self._sums, Counter[str]()
        if not (texts := sums["texts"]):
            return {}
        return {
            TOKENS_PER_TEXT: sums["tokens"] / texts,
            TRUNCATED: 1 - sums["finished"] / texts,
            "rollout/staleness": sums["staleness"] / texts,
            "rollout/seconds": sums["microseconds"] / 1e6,
        }

    def _requested(self, steps: Sequence[int], *, version: int) -> Callable[[], None]:
        """Ask for the texts of some steps, and return what generates and writes them.

        Rank r generates the texts r, r + world and so on. Both are collectives.
        """
        every = [
            (at, int(row))
            for at in steps
            if learns_from_texts(self.config, at, seed=self.seed)
            for row in self.continued(at)
        ]
        if not every:  # all of the steps use the data
            return lambda: None
        rank, world = self.layout.shape.rank, self.layout.shape.world
        mine = every[rank::world]
        prompts = [self.prompts.prompt(row) for _, row in mine]
        seeds = [text_seed(self.seed, step, row) for step, row in mine]
        self.generator.update(version)
        texts = self.generator.begin(prompts, seeds, self.config.how)

        def write() -> None:
            began = time.perf_counter()
            with activity(f"generating {len(every)} texts at step {steps[0]}"):
                answers = zip(mine, prompts, texts(), seeds, strict=True)
            self._sums["microseconds"] += round(1e6 * (time.perf_counter() - began))
            parts = gather([Rollout(row, p, *text, version, s) for (_, row), p, text, s in answers])
            rollouts = [parts[number % world][number // world] for number in range(len(every))]
            by_step = {
                step: [text for (at, _), text in zip(every, rollouts, strict=True) if at == step]
                for step in steps
            }
            on_main(lambda: self._write(by_step))

        return write

    def _write(self, by_step: dict[int, list[Rollout]]) -> None:
        # Backwards: if the first step has its texts, the later steps have theirs too, and no texts
        # of one block are generated by two versions of the student.
        for step, texts in reversed(by_step.items()):
            if not (path := self._path(step)).is_file():
                write_rollouts(path, texts)
        first = self.oldest()
        for path in self.folder.glob(f"step-{'[0-9]' * 8}.jsonl"):
            if path < self._path(first):
                path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return file_of_step(self.folder, step)


def learns_from_texts(config: RolloutConfig, step: int, *, seed: int) -> bool:
    """Return whether a step learns from texts, the same on all ranks."""
    draw = np.random.default_rng([seed, _DRAW, step]).random()
    return step >= config.from_step and draw < config.mix


def text_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of the text that continues a row's prompt at a step; below 2 ** 63."""
    key = f"{seed}:{step}:{row}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
