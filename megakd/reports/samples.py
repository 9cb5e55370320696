"""Samples for the report: a few held-out prompts with outputs of the teacher and the student.

The engines of the evaluation compute the outputs, so that a model does not have to fit on a single
rank. All ranks use the same prompts in the same number of steps, because under ZeRO-3 every forward
is a collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.data.chat_tokens import PROMPT_LENGTH
from megakd.data.collation import Collator
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.student import device_batch

PROMPTS = 3
PROMPT_TOKENS, NEW_TOKENS = 16, 16
TEXT_TOKENS = 32


def held_out_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, device: torch.device
) -> SamplePrompts | None:
    """Return the prompts of a language model's report; None if no text is long enough."""
    first = [cast("Mapping[str, Any]", row) for row in rows.select(range(min(32, len(rows))))]
    if task.type == "mlm":
        masked = [_masked(row["input_ids"], tokenizer) for row in first]
        ids = [one for one in masked if tokenizer.mask_token_id in one]
    else:
        ids = [one for row in first if 0 < len(one := _beginning(row)) < task.row_length]
    return SamplePrompts(ids[:PROMPTS], tokenizer, task, device) if ids else None


@dataclass(frozen=True)
class SamplePrompts:
    """Tokens of texts with masks, or of beginnings that a decoder continues greedily."""

    ids: Sequence[Sequence[int]]
    tokenizer: PreTrainedTokenizerBase
    task: TaskConfig
    device: torch.device

    @property
    def shown(self) -> list[str]:
        """The prompts as text, with masks and without other special tokens."""
        return [self._decoded(ids) for ids in self.ids]

    def answers(self, model: FrozenTeacher) -> list[str]:
        """Return the most likely tokens for each prompt; a collective."""
        if self.task.type == "mlm":
            # `batch_decode` of transformers 5 takes a list of numbers for one text.
            decode: Any = self.tokenizer.decode
            words = self._most_likely(model, self.ids)
            return [", ".join(decode([i]).strip() for i in of_text) for of_text in words]
        rows = [list(row) for row in self.ids]
        for _ in range(min(NEW_TOKENS, self.task.row_length - max(map(len, rows)))):
            for row, ids in zip(rows, self._most_likely(model, rows), strict=True):
                row.extend(ids)
        end = self.tokenizer.eos_token_id
        new = (row[len(begun) :] for row, begun in zip(rows, self.ids, strict=True))
        return [self._decoded(ids[: ids.index(end)] if end in ids else ids) for ids in new]

    def _most_likely(
        self, model: FrozenTeacher, rows: Sequence[Sequence[int]]
    ) -> Iterator[list[int]]:
        """Return for each row the tokens at its masks, or the token after its last one."""
        batch = Collator(self.tokenizer, self.task)([{"input_ids": row} for row in rows])
        ids = batch.inputs["input_ids"]  # [B, T]
        if self.task.type == "mlm":
            places = ids.eq(cast("int", self.tokenizer.mask_token_id))
        else:  # padding is after the tokens, which do not see it
            lengths = torch.tensor([len(row) for row in rows])
            places = torch.arange(ids.shape[1]) == lengths[:, None] - 1
        batch = batch._replace(targets=places.flatten().nonzero().flatten())
        best = model.top_k(device_batch(batch, self.device), 1).ids.flatten()
        return (one.tolist() for one in best.split(places.sum(dim=1).tolist()))

    def _decoded(self, ids: Sequence[int]) -> str:
        mask = cast("int | None", self.tokenizer.mask_token_id)
        special = {*self.tokenizer.all_special_ids} - {mask}
        return cast("str", self.tokenizer.decode([i for i in ids if i not in special]))


def _beginning(row: Mapping[str, Any]) -> list[int]:
    # The prompt of a conversation, or the beginning of the longest document of a packed row.
    ids = row["input_ids"]
    if PROMPT_LENGTH in row:
        return ids[: row[PROMPT_LENGTH]]
    starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    start, end = max(pairwise([*starts, len(ids)]), key=lambda span: span[1] - span[0])
    return ids[start : min(end, start + min(PROMPT_TOKENS, len(ids) // 2))]


def _masked(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # One of every six tokens, but no special tokens.
    short, special = [*ids[:TEXT_TOKENS]], {*tokenizer.all_special_ids}
    plain = [place for place, token in enumerate(short) if token not in special]
    for place in plain[2::6] or plain[:1]:
        short[place] = cast("int", tokenizer.mask_token_id)  # their own type allows several
    return short
