"""Texts that a student generates at an evaluation, scored against answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megakd.config.sections import GenerationConfig
from megakd.config.task import MATCH, file_of_step
from megakd.data.batch import IGNORE
from megakd.engine.collectives import gather, on_main
from megakd.engine.distributed import Ranks
from megakd.models.generation import Completion, Generator
from megakd.process.files import json_text, write_text
from megakd.teachers.rollouts import Prompts


@dataclass(frozen=True)
class TextEvaluation:
    """Continues held-out prompts, and scores the texts; every call is a collective.

    The first prompts that are continued are used; `folder` gets a file of texts per evaluation.
    """

    config: GenerationConfig
    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    generator: Generator
    ranks: Ranks
    folder: Path

    def scores(self, version: int) -> dict[str, float]:
        """Generate and score the texts, and write them; the same on every rank.

        `version`: number of updates of the student.
        """
        texts = self.texts()
        lines = [json_text(text) + "\n" for text in texts]
        on_main(lambda: write_text(file_of_step(self.folder, version), "".join(lines)))
        metrics = {} if self.config.match is None else {MATCH: 0.0}
        metrics["text_tokens"] = sum(text["tokens"] for text in texts) / len(texts)
        metrics["text_truncated"] = sum(not text["finished"] for text in texts) / len(texts)
        compared = [text["matches"] for text in texts if text["matches"] is not None]
        if compared:
            metrics[MATCH] = sum(compared) / len(compared)
        return metrics

    def texts(self) -> list[dict[str, Any]]:
        """Return what is written of the texts for the first rows, the same on every rank."""
        rank, world = self.ranks.rank, self.ranks.world_size
        rows = self.prompts.continued[: self.config.rows].tolist()
        mine = rows[rank::world]
        prompts = [self.prompts.prompt(row) for row in mine]
        # The row is the seed: evaluations of one run differ only in the student.
        completions = self.generator.begin(prompts, mine, self.config.how)()
        parts = gather(list(map(self._text, mine, prompts, completions)))
        return [parts[number % world][number // world] for number in range(len(rows))]

    def _text(self, row: int, prompt: Sequence[int], completion: Completion) -> dict[str, Any]:
        def decoded(tokens: Sequence[int], *, skip: bool) -> str:
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip))

        text = decoded(completion.ids, skip=True)
        (ids, labels), start = self.prompts.row(row), len(prompt)
        # The row's own answer ends before the next turn of a user; a label is the next token.
        counted = (labels[start - 1 :] != IGNORE).tolist()
        end = start + counted.index(False) if False in counted else len(ids)
        answer = decoded(ids[start:end].tolist(), skip=True)
        # A row that is a prompt alone has nothing to compare with, and what was cut off a row as
        # long as the longest may be its answer.
        is_whole = len(ids) != self.prompts.row_length
        is_compared = self.config.match is not None and answer and is_whole
        return {
            "prompt": decoded(prompt, skip=False),
            "text": text,
            "wanted": answer,
            "finished": completion.finished,
            "matches": is_match(text, answer, self.config.answer) if is_compared else None,
            "tokens": len(completion.ids),
        }


def is_match(text: str, wanted: str, pattern: str | None) -> bool:
    """Return whether two texts have the same answer, see `answer_of`."""
    answer = answer_of(text, pattern)
    return answer is not None and answer == answer_of(wanted, pattern)


def answer_of(text: str, pattern: str | None) -> str | None:
    """Return the answer in a text: the group of the last match; None without a match."""
    if pattern is None:
        return text.strip()
    matches = re.findall(pattern, text)
    return matches[-1].strip() if matches else None
