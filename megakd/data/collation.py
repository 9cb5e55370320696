"""Micro-batches of padded rows, and the documents in them.

Shapes: B rows of a micro-batch, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, SOFT, Batch, Documents

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
    no tokens are masked or labelled yet; see `masking`.
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
        batch = self._text_batch(padded, columns.get("label", _NOTHING)[0], valid)
        if SOFT not in columns:
            return batch
        soft = np.zeros((len(valid), columns[SOFT][0].shape[1]), np.float32)
        soft[: len(columns[SOFT][0])] = columns[SOFT][0]
        return batch.extended(soft=torch.from_numpy(soft))

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
