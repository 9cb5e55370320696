"""Samples for the report: a few held-out prompts with outputs of the teacher and the student.

The engines of the evaluation compute the outputs, so that a model does not have to fit on a single
rank. All ranks use the same prompts in the same number of steps, because under ZeRO-3 every forward
is a collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, Batch
from megakd.contract.results import SampleReport
from megakd.data.chat.tokens import PROMPT_LENGTH
from megakd.data.collation import Collator
from megakd.engine.student import device_batch
from megakd.teachers.frozen import FrozenTeacher

PROMPTS = 3
PROMPT_TOKENS, NEW_TOKENS = 16, 16
TEXT_TOKENS = 32


def held_out_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, device: torch.device
) -> Prompts | None:
    """Return the prompts of a language model's report; None for any other task."""
    first = rows.select(range(min(32, len(rows))))
    if task.type == "mlm":
        return _hidden_words(first, tokenizer, task, device)
    if task.type != "causal_lm":
        return None
    ids = _beginnings(first, task.row_length)[:PROMPTS]
    if not ids:
        return None
    new_tokens = min(NEW_TOKENS, task.row_length - max(map(len, ids)))
    return Continuations(ids=ids, new_tokens=new_tokens, tokenizer=tokenizer, device=device)


def samples_of(
    prompts: Prompts | None, *, teacher: Sequence[str] | None, student: Sequence[str] | None
) -> list[SampleReport]:
    """Return the samples of report.json, from the answers of both models to the prompts."""
    if prompts is None or student is None:
        return []
    # A teacher with a tokenizer of its own cannot read the prompts.
    rows = zip(prompts.shown, teacher or [None] * len(student), student, strict=True)
    return [{"prompt": prompt, "teacher": a, "student": b} for prompt, a, b in rows]


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """Beginnings of documents, or prompts of conversations, that a decoder continues greedily.

    ids: the tokens of each beginning.
    new_tokens: number of tokens to generate; a text ends earlier at the end-of-text token.
    """

    ids: Sequence[Sequence[int]]
    new_tokens: int
    tokenizer: PreTrainedTokenizerBase
    device: torch.device

    @property
    def shown(self) -> list[str]:
        """The beginnings as text, with the end tokens of earlier turns left out."""
        return [self._decoded(ids) for ids in self.ids]

    def answers(self, model: FrozenTeacher) -> list[str]:
        rows = [list(row) for row in self.ids]
        for _ in range(self.new_tokens):
            next_ids = model.top_k(self._batch(rows), 1).ids  # [B, 1]
            for row, (token,) in zip(rows, next_ids.tolist(), strict=True):
                row.append(token)
        end = self.tokenizer.eos_token_id
        new = (row[len(begun) :] for row, begun in zip(rows, self.ids, strict=True))
        return [self._decoded(ids[: ids.index(end)] if end in ids else ids) for ids in new]

    def _batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        # Padding is after the tokens, which do not see it.
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # [B, T]
        lengths = torch.tensor(list(map(len, rows)))
        places = torch.arange(ids.shape[1]).expand_as(ids)
        valid = places < lengths[:, None]
        inputs = {"input_ids": ids, "position_ids": places}
        last = torch.arange(len(rows)) * ids.shape[1] + lengths - 1
        return device_batch(Batch(inputs, torch.full_like(ids, IGNORE), valid, last), self.device)

    def _decoded(self, ids: Sequence[int]) -> str:
        return cast("str", self.tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass(frozen=True, kw_only=True)
class HiddenWords:
    """Texts with masked tokens that a masked language model predicts.

    batch: the texts with masks, on this rank's device; `targets` are the masked positions.
    masks: number of masked tokens of each text, in the order of the targets.
    """

    batch: Batch
    shown: Sequence[str]
    masks: Sequence[int]
    tokenizer: PreTrainedTokenizerBase

    def answers(self, model: FrozenTeacher) -> list[str]:
        texts = model.top_k(self.batch, 1).ids.flatten().split(list(self.masks))
        words = ([self.tokenizer.decode([token]) for token in ids.tolist()] for ids in texts)
        return [", ".join(cast("str", word).strip() for word in text) for text in words]


Prompts = Continuations | HiddenWords


def _beginnings(rows: Dataset, max_length: int) -> list[list[int]]:
    if PROMPT_LENGTH in rows.column_names:
        mappings = (cast("Mapping[str, Any]", row) for row in rows)
        prompts = (row["input_ids"][: row[PROMPT_LENGTH]] for row in mappings)
        return [ids for ids in prompts if 0 < len(ids) < max_length]
    documents = list(_documents(rows))
    longest = max(map(len, documents), default=0)
    length = min(PROMPT_TOKENS, max(1, max_length // 2), longest)
    return [ids[:length] for ids in documents if len(ids) >= length]


def _documents(rows: Dataset) -> Iterator[list[int]]:
    continues = False
    for row in rows:
        ids, places, labels = (
            cast("Mapping[str, list[int]]", row)[name]
            for name in ("input_ids", "position_ids", "labels")
        )
        starts = [i for i, place in enumerate(places) if place == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if start > 0 or not continues:
                yield ids[start:end]
        # At the end of a document, there is no next token as label.
        continues = labels[-1] != IGNORE


def _hidden_words(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, device: torch.device
) -> HiddenWords | None:
    texts = [cast("Mapping[str, list[int]]", row)["input_ids"] for row in rows]
    # The last token marks the end of a text.
    texts = [t if len(t) <= TEXT_TOKENS else [*t[: TEXT_TOKENS - 1], t[-1]] for t in texts]
    special = {int(number) for number in tokenizer.all_special_ids}
    hidden = ((ids, _hidden(ids, special)) for ids in texts)
    chosen = [(ids, places) for ids, places in hidden if places][:PROMPTS]
    if not chosen:
        return None
    batch = Collator(tokenizer, task)([{"input_ids": ids} for ids, _ in chosen])
    ids = batch.inputs["input_ids"].clone()  # [B, T]
    width = ids.shape[1]
    targets = torch.tensor([r * width + p for r, (_, places) in enumerate(chosen) for p in places])
    mask = cast("int", tokenizer.mask_token_id)  # transformers' own type allows several
    ids.view(-1)[targets] = mask
    batch = batch._replace(inputs={**batch.inputs, "input_ids": ids}, targets=targets)
    shown = [[token for token in row if token not in special - {mask}] for row in ids.tolist()]
    return HiddenWords(
        batch=device_batch(batch, device),
        shown=[cast("str", tokenizer.decode(row)) for row in shown],
        masks=[len(places) for _, places in chosen],
        tokenizer=tokenizer,
    )


def _hidden(ids: Sequence[int], special: set[int]) -> list[int]:
    # One of every six tokens, at most four, but no special tokens.
    plain = [place for place, token in enumerate(ids) if token not in special]
    return (plain[2::6] or plain[:1])[:4]
