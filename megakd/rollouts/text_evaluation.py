"""Evaluation of a student on texts that it generates from held-out prompts."""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from megakd.config.rollout import GenerationConfig
from megakd.contract.batch import IGNORE
from megakd.contract.completions import Generator, Rollout
from megakd.contract.tasks import MATCH, file_of_step
from megakd.engine.collectives import gather, on_main
from megakd.engine.distributed import Ranks
from megakd.errors import ConfigError
from megakd.rollouts.prompts import Prompts
from megakd.storage.atomic import json_text, write_text

Match = Callable[[str, str], bool]
"""Function from a generated text and the text of the data to whether their answers are equal."""
LIMIT_S = 5
"""Seconds after which an expression is not the answer."""


class Text(NamedTuple):
    """One generated text of an evaluation; `matches` is None if texts are not compared."""

    rollout: Rollout
    prompt: str
    text: str
    wanted: str
    matches: bool | None

    def record(self) -> dict[str, object]:
        return {
            "prompt": self.prompt,
            "text": self.text,
            "wanted": self.wanted,
            "finished": self.rollout.completion.finished,
            "matches": self.matches,
        }


class TextEvaluation:
    """Continues held-out prompts, and scores the texts; every call is a collective.

    The first prompts that are continued are used; `folder` gets a file of texts per evaluation.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        *,
        generator: Generator,
        ranks: Ranks,
        folder: Path,
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._prompts, self._rows = prompts, prompts.continued[: config.rows].tolist()
        self._generator, self._ranks, self._folder = generator, ranks, folder
        self._match = matcher(config)

    def scores(self, version: int) -> dict[str, float]:
        """Generate and score the texts, and write them; the same on every rank.

        `version`: number of updates of the student.
        """
        texts = self.texts(version)
        lines = [json_text(text.record()) + "\n" for text in texts]
        on_main(lambda: write_text(file_of_step(self._folder, version), "".join(lines)))
        return ({} if self._match is None else {MATCH: 0.0}) | text_metrics(texts)

    def texts(self, version: int) -> list[Text]:
        """Return the texts for the first rows, the same on every rank."""
        rank, world = self._ranks.rank, self._ranks.world_size
        mine = self._rows[rank::world]
        prompts = [self._prompts.prompt(row) for row in mine]
        # The row is the seed: evaluations of one run differ only in the student.
        completions = self._generator.generate(prompts, mine, self._config.how)
        of_rank = [
            self._text(Rollout(row, prompt, completion, version, seed=row))
            for row, prompt, completion in zip(mine, prompts, completions, strict=True)
        ]
        parts = gather(of_rank)
        return [parts[number % world][number // world] for number in range(len(self._rows))]

    def _text(self, rollout: Rollout) -> Text:
        def decoded(ids: Sequence[int], *, skip: bool) -> str:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip))

        text = decoded(rollout.completion.ids, skip=True)
        row, start = self._prompts.row(rollout.row), len(rollout.prompt)
        # The row's own answer ends before the next turn of a user; a label is the next token.
        counted = (row.labels[start - 1 :] != IGNORE).tolist()
        end = start + counted.index(False) if False in counted else len(row.input_ids)
        answer = decoded(row.input_ids[start:end].tolist(), skip=True)
        # A row that is a prompt alone has nothing to compare with, and what was cut off a row as
        # long as the longest may be its answer.
        is_whole = len(row.input_ids) != self._prompts.row_length
        matches = self._match(text, answer) if self._match and answer and is_whole else None
        return Text(rollout, decoded(rollout.prompt, skip=False), text, answer, matches)


def matcher(config: GenerationConfig) -> Match | None:
    """Return the comparison of a config; None if texts are not compared."""
    if config.match is None:
        return None
    is_part = config.answer is not None
    equal = operator.eq if config.match == "exact" else _same_mathematics(is_part=is_part)

    def match(text: str, wanted: str) -> bool:
        given, there = answer_of(text, config.answer), answer_of(wanted, config.answer)
        return given is not None and there is not None and equal(given, there)

    return match


def answer_of(text: str, pattern: str | None) -> str | None:
    """Return the answer in a text: the group of the last match; None without a match."""
    if pattern is None:
        return text.strip()
    matches = re.findall(pattern, text)
    return matches[-1].strip() if matches else None


def _same_mathematics(*, is_part: bool) -> Match:
    """Return the comparison of math-verify; `is_part`: of expressions alone, not of texts."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError(
            "eval.generation.match: math needs the package math-verify, which is not installed; "
            "install megakd[eval], or set the key to exact"
        ) from error

    def is_equal(given: str, wanted: str) -> bool:
        if is_part and given == wanted:
            return True
        # The limit of math-verify, without which 9^{9^9} takes for ever, is a signal, which only a
        # main thread may set.
        seconds: Any = LIMIT_S if threading.current_thread() is threading.main_thread() else None
        texts = (f"${text}$" if is_part else text for text in (wanted, given))
        gold, answer = (parse(text, parsing_timeout=seconds) for text in texts)
        return bool(verify(gold, answer, timeout_seconds=seconds))

    return is_equal


def text_metrics(texts: Sequence[Text]) -> dict[str, float]:
    """Return the metrics of at least one generated text."""
    completions = [text.rollout.completion for text in texts]
    metrics = {
        "text_tokens": sum(len(completion.ids) for completion in completions) / len(texts),
        "text_truncated": sum(not completion.finished for completion in completions) / len(texts),
    }
    compared = [text.matches for text in texts if text.matches is not None]
    if compared:
        metrics[MATCH] = sum(compared) / len(compared)
    return metrics
