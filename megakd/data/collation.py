"""Micro-batches of padded rows, the documents in them, and dynamic masks.

Shapes: B rows of a micro-batch, T positions.

A mask is a pure function of (seed, draw, row, position). It does not depend on the split of a step
into ranks and micro-batches, on the padding, or on where a run was resumed: the numbers are those
of SplitMix64 (Steele, Lea and Flood 2014), one stream per row and draw. Rows may mix the tokens of
two vocabularies, see `SecondTokens`. Shapes: B rows of a micro-batch, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.data.batch import IGNORE, Batch, Documents, Targets

LENGTH_MULTIPLE = 8

_FILL = {"labels": IGNORE, "token_type_ids": 0}

_PADDED = ("input_ids", "position_ids", *_FILL)
"""Columns with a value per token; rows may have further columns for other models."""

Columns = dict[str, "tuple[NDArray, NDArray]"]
"""Column name -> (values of all rows concatenated, number of values per row).

The values of a column with equally many in every row are [rows, number]."""

_NOTHING = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


class Collator:
    """A function that collates rows to one padded micro-batch.

    For causal_lm, `inputs` has `input_ids` and `position_ids`, and the model must be called with
    `use_cache=False`; see `token_tables`. A row without `position_ids` is one document. For mlm,
    no tokens are masked or labelled yet; see `Masking`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> None:
        # Padding is a separate document and not valid, so any token can be used.
        pad_id = tokenizer.pad_token_id
        self._pad_id = pad_id if isinstance(pad_id, int) else 0
        self._max_length = task.row_length
        self._type = task.type

    def __call__(
        self, rows: Sequence[Mapping[str, object]] | object, *, dummy_rows: int = 0
    ) -> Batch:
        """Pad rows to the longest row, rounded up to a multiple of 8, at most `max_length`.

        Args:
            rows: an arrow table or another slice of an encoded data set (column -> values),
                or a sequence of rows; may be empty.
            dummy_rows: number of rows to add at the end, which keep the ranks in step. Dummy rows
                have no valid position and no label, and the outputs of a model for them are finite.
        """
        columns = columns_of(rows) or {"input_ids": _NOTHING}
        lengths = np.concatenate([columns["input_ids"][1], np.zeros(dummy_rows, dtype=np.int64)])
        width = padded_width(int(lengths.max()), self._max_length)
        valid = np.arange(width) < lengths[:, None]  # [B, T]
        padded: dict[str, NDArray[np.int64]] = {}
        for name, (values, _) in columns.items():
            if name in _PADDED:
                padded[name] = np.full(valid.shape, _FILL.get(name, self._pad_id), dtype=np.int64)
                padded[name][valid] = values
        if self._type == "causal_lm":
            return _language_batch(padded, valid, lengths)
        return self._text_batch(padded, columns.get("label", _NOTHING)[0], valid)

    def _text_batch(self, padded: Mapping[str, NDArray], given: NDArray, valid: NDArray) -> Batch:
        # A dummy row attends to its first position, to avoid NaN.
        attention = valid.astype(np.int64)
        attention[~valid.any(axis=1), 0] = 1
        inputs = {"attention_mask": torch.from_numpy(attention)}
        inputs |= {name: torch.from_numpy(values) for name, values in padded.items()}
        if self._type == "mlm":  # no token is masked yet
            labels = np.full(valid.shape, IGNORE, dtype=np.int64)
        elif given.ndim == 2:  # several labels: 0 or 1 by class
            labels = np.full((len(valid), given.shape[1]), np.nan, np.float32)
            labels[: len(given)] = np.where(given == IGNORE, np.nan, given)
        else:
            missing = (np.nan, np.float32) if self._type == "regression" else (IGNORE, np.int64)
            labels = np.full(len(valid), *missing)
            labels[: len(given)] = given
        return Batch(inputs, torch.from_numpy(labels), torch.from_numpy(valid))


def padded_width(longest: int, most: int) -> int:
    """Return the positions of a padded row: a multiple of 8, at least 8, but at most `most`."""
    rounded = -(-max(longest, 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return min(rounded, most)


def _language_batch(padded: dict[str, NDArray], valid: NDArray, lengths: NDArray) -> Batch:
    # Positions restart at padding, which no token sees.
    after_start = np.arange(valid.shape[1])
    after_end = after_start - lengths[:, None]  # [B, T]
    positions = np.where(valid, padded.get("position_ids", after_start), after_end)
    labels = padded.get("labels", np.full(valid.shape, IGNORE, dtype=np.int64))
    inputs = {
        "input_ids": torch.from_numpy(padded["input_ids"]),
        "position_ids": torch.from_numpy(positions),
    }
    tensors = torch.from_numpy(labels), torch.from_numpy(valid)
    return Batch(inputs, *tensors, documents=documents_of(positions))


def documents_of(positions: Any) -> Documents:
    """Return the documents of rows, from positions [B, T] that restart with every document."""
    begins = np.diff(positions, axis=1, prepend=positions[:, :1]) != 1
    starts = np.append(np.flatnonzero(begins), positions.size).astype(np.int32)
    return Documents(torch.from_numpy(starts), int(np.diff(starts).max(initial=0)))


def columns_of(rows: object) -> Columns:
    """Return the columns of rows given as an arrow table, a mapping of columns or a sequence."""
    table: Any = rows  # pyarrow carries no types
    if isinstance(rows, Mapping):
        table = pa.table({name: list(values) for name, values in table.items()})
    elif not isinstance(rows, pa.Table):
        table = pa.Table.from_pylist(table)
    columns: Columns = {}
    for name in table.column_names:
        array = table.column(name).combine_chunks()
        if pa.types.is_fixed_size_list(array.type):
            width = array.type.list_size
            columns[name] = (
                array.flatten().to_numpy().reshape(-1, width),
                np.full(len(array), width),
            )
        elif pa.types.is_list(array.type):
            columns[name] = array.flatten().to_numpy(), array.value_lengths().to_numpy()
        else:
            ones = np.ones(len(array), dtype=np.int64)
            columns[name] = array.to_numpy(zero_copy_only=False), ones
    return columns


DEFAULT_PROBABILITY = 0.15

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Fractions of the chosen tokens that become the mask token or a random token.

The other chosen tokens are not changed.
"""


class SecondTokens(NamedTuple):
    """The tokens of a second vocabulary, between the tokens of the first in `input_ids`.

    offset: the number in `input_ids` of the second vocabulary's token 0. Smaller numbers are tokens
        of the first vocabulary.
    vocabulary: tokens that may replace a masked token of the second vocabulary at random, numbered
        as in `input_ids`.
    """

    offset: int
    vocabulary: NDArray[np.int64]

    def contains(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether each token is of the second vocabulary."""
        return ids >= self.offset

    def targets(self, ids: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Targets:
        """Return the chosen positions of the second vocabulary, at least one, with labels."""
        chosen = chosen & self.contains(ids)
        positions = _targets(chosen)
        labels = np.where(chosen, ids - self.offset, IGNORE).ravel()[positions]
        return Targets(torch.from_numpy(positions), torch.from_numpy(labels))


@dataclass(frozen=True, kw_only=True, eq=False)
class Masking:
    """A function that masks tokens of a micro-batch and sets the original tokens as labels.

    Labels are not shifted.

    mask_id: the mask token.
    special_ids: tokens that are never masked.
    vocabulary: tokens that may replace a masked token at random.
    probability: probability of each token to be chosen; at least one token per row is chosen.
    second: the second vocabulary, if the rows mix two. A random token is then of the same
        vocabulary as the token that it replaces. The labels of the second vocabulary are in
        `Batch.second`, in its own numbering, and `labels` and `targets` leave them out.
    """

    mask_id: int
    special_ids: Sequence[int]
    vocabulary: NDArray[np.int64]
    probability: float = DEFAULT_PROBABILITY
    second: SecondTokens | None = None

    def __call__(
        self, batch: Batch, rows: NDArray[np.int64], *, seed: int, draw: int | NDArray[np.int64]
    ) -> Batch:
        """Return the batch, on the CPU, with masked `input_ids`, `labels` [B, T] and `targets`.

        `rows` and `draw`: see `row_keys`.
        """
        ids = batch.inputs["input_ids"].numpy()  # [B, T]
        real = batch.valid.numpy()
        maskable = real & ~np.isin(ids, self.special_ids)
        keys = row_keys(seed, draw, rows, size=len(ids))[:, None]
        # Three numbers in [0, 1) for each position, [B, T]: whether, how, and by which token.
        numbers = uniform(keys, np.arange(1, 3 * ids.shape[1] + 1, dtype=np.uint64))
        choice, fate, token = (numbers[:, part::3] for part in range(3))
        lowest = np.where(maskable, choice, np.inf).min(axis=1, keepdims=True)
        chosen = maskable & ((choice < self.probability) | (choice == lowest))
        shown = np.where(chosen, self._shown(ids, fate, token), ids)
        inputs = {**batch.inputs, "input_ids": torch.from_numpy(shown)}
        second = None if self.second is None else self.second.targets(ids, chosen)
        if self.second is not None:
            chosen = chosen & ~self.second.contains(ids)
        return batch._replace(
            inputs=inputs,
            labels=torch.from_numpy(np.where(chosen, ids, IGNORE)),
            targets=torch.from_numpy(_targets(chosen)),
            second=second,
        )

    def _shown(
        self, ids: NDArray[np.int64], fate: NDArray[np.float64], token: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        random = _picked(self.vocabulary, token)
        if self.second is not None:
            others = _picked(self.second.vocabulary, token)
            random = np.where(self.second.contains(ids), others, random)
        is_masked, is_random = fate < MASKED_SHARE, fate < MASKED_SHARE + RANDOM_SHARE
        return np.where(is_masked, self.mask_id, np.where(is_random, random, ids))


def task_masking(
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    *,
    second: PreTrainedTokenizerBase | None = None,
) -> Masking | None:
    """Return the masking of an mlm task; None for other tasks.

    `second` is the tokenizer of a second vocabulary, whose token 0 has the number `len(tokenizer)`
    in the rows.
    """
    if task.type != "mlm":
        return None
    special, ordinary = _special_and_ordinary(tokenizer)
    others = None
    if second is not None:
        offset = len(tokenizer)
        more_special, more = _special_and_ordinary(second)
        special += [offset + number for number in more_special]
        others = SecondTokens(offset, offset + np.array(more, dtype=np.int64))
    return Masking(
        mask_id=cast("int", tokenizer.mask_token_id),  # transformers' own type allows several
        special_ids=special,
        vocabulary=np.array(ordinary),
        probability=task.mlm_probability or DEFAULT_PROBABILITY,
        second=others,
    )


def _special_and_ordinary(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    special = {int(number) for number in tokenizer.all_special_ids}
    return sorted(special), sorted(set(tokenizer.get_vocab().values()) - special)


def _picked(vocabulary: NDArray[np.int64], numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    return vocabulary[(numbers * len(vocabulary)).astype(np.int64)]


def _targets(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.flatnonzero(chosen) if chosen.any() else np.zeros(1, dtype=np.int64)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def row_keys(
    seed: int, draw: int | NDArray[np.int64], rows: NDArray[np.int64], *, size: int, domain: int = 0
) -> NDArray[np.uint64]:
    """Return the keys [B] of the streams of a micro-batch's rows.

    `draw` is the number of the draw, such as the epoch, for all rows or by row. `rows` are numbers
    of at least 0; further rows, up to `size`, are dummy rows, on whose keys nothing may depend. The
    streams of two domains are independent.
    """
    parts = np.zeros((3, size), dtype=np.uint64)
    parts[0] = seed
    parts[1, : len(rows)] = draw
    parts[2, : len(rows)] = rows
    key = np.zeros(size, dtype=np.uint64)
    for part in parts:
        key = _mixed(key + part + _GOLDEN)
    return _mixed(key + np.uint64(domain) + _GOLDEN) if domain else key


def uniform(keys: NDArray[np.uint64], counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return the numbers in [0, 1) at places of streams."""
    values = _mixed(keys + counters * _GOLDEN) >> np.uint64(11)
    return values.astype(np.float64) * 2.0**-53


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))
