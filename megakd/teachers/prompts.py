"""The prompts that generators continue, and texts as training rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from megakd.config.rollout import TextsConfig
from megakd.config.run import RunConfig
from megakd.contract.batch import IGNORE, ROUTE
from megakd.contract.completions import Rollout
from megakd.data.arrow import column_of
from megakd.data.chat.tokens import PROMPT_LENGTH
from megakd.data.encoding import Encoded
from megakd.data.loader import lengths_of_rows, prompt_lengths, rows_with_targets
from megakd.errors import ConfigError, DataError
from megakd.models.architectures import context_length
from megakd.models.source import ModelSource

logger = logging.getLogger(__name__)


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
