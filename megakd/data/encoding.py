"""Texts as token numbers: encoded once, memory-mapped from disk, padded per micro-batch.

Shapes: B rows of a micro-batch, T positions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from megakd.contract.batch import IGNORE, Batch, Documents
from megakd.contract.routes import ROUTE
from megakd.data.cache import read_rows, write_tables
from megakd.data.chat_counts import SETS
from megakd.data.chat_encoding import counts_of, encode_chat
from megakd.data.chat_rows import is_chat
from megakd.data.encoded_keys import encoded_key
from megakd.data.rows import LABELS_AT_ONCE, arrow_batches
from megakd.data.token_tables import check_room_for_text, tables_of, with_tokens
from megakd.data.words import WORD_STARTS
from megakd.errors import DataError
from megakd.storage.folders import whole_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from megakd.config.task import TaskConfig
    from megakd.data.chat_counts import ChatCounts
    from megakd.data.splits import Splits
    from megakd.data.text_stream import TextStream

logger = logging.getLogger(__name__)
ROWS_AT_ONCE = 10_000

LENGTH_MULTIPLE = 8
_FILL = {"labels": IGNORE, "token_type_ids": 0, WORD_STARTS: 0}
_PADDED = ("input_ids", "position_ids", *_FILL)
"""Columns with a value per token; rows may have further columns for other models."""


class StreamedRows(NamedTuple):
    """Training rows that are encoded while they are needed: the texts, and how to encode them."""

    texts: TextStream
    tokenizer: PreTrainedTokenizerBase
    task: TaskConfig


class Encoded(NamedTuple):
    """The splits as token numbers, memory-mapped.

    Columns for classification and regression: `input_ids`, `label`, and for pairs `token_type_ids`
    if the tokenizer returns them. For mlm: `input_ids`, with a row per window of a text (see
    `windows`), and `word_starts` for whole-word masking (see `words`). For causal_lm: `input_ids`,
    `position_ids` and `labels` (see `packing`), or for conversations `input_ids`, `labels` and
    `prompt_length` (see `chat_tokens`). Rows that name their teacher also have its number in
    `route` (see `contract.routes`).

    tokens_per_row: mean number of tokens of a training row, or with a stream of a validation row,
        without padding.
    stream: the training rows with `task.streaming`; `train` is then empty.
    evaluation_sets: further rows to score, by name; not part of content_hash.
    chat: the numbers of the conversations by split, and by `sets/NAME` for the evaluation sets;
        None for other rows.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    content_hash: str
    tokens_per_row: float
    evaluation_sets: Mapping[str, Dataset] = MappingProxyType({})
    stream: StreamedRows | None = None
    chat: Mapping[str, ChatCounts] | None = None

    @property
    def held_out(self) -> Dataset:
        """The split that the report's metrics are computed on."""
        return self.validation if self.test is None else self.test


def encode_splits(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    *,
    cache_dir: Path,
    with_train: bool = True,
) -> Encoded:
    """Encode all splits except a stream, or reuse the result of an earlier call with equal content.

    Args:
        splits: texts and labels.
        tokenizer: the tokenizer; the key contains its content, not its name.
        task: the task; only `type`, `max_length` and `whole_word_masking` are used.
        cache_dir: folder for the arrow files, which are written whole or not at all into a
            subfolder named by a content key. Ranks may call this function at the same time, but it
            is cheaper to let one rank run first.
        with_train: whether the training rows are encoded; otherwise `train` is empty.

    Raises:
        DataError: `max_length` leaves no room for text, a split has no tokens, or the cache
            cannot be written.
    """
    present = {n: r for n, r in _named(splits) if r is not None and (with_train or n != "train")}
    made, key = encode_rows(
        present, tokenizer, task, content_hash=splits.content_hash, cache_dir=cache_dir
    )
    chat = counts_of(cache_dir, key) if is_chat(splits.validation) else None
    counted, stream = made.get("train", made["validation"]), None
    if splits.stream is not None:
        stream = StreamedRows(splits.stream, tokenizer, task)
    made.setdefault("train", made["validation"].select([]))
    sets: Mapping[str, Dataset] = {}
    if splits.evaluation_sets:
        sets, sets_key = encode_rows(
            splits.evaluation_sets,
            tokenizer,
            task,
            content_hash=splits.sets_hash,
            cache_dir=cache_dir,
        )
        if chat is not None:
            scored = counts_of(cache_dir, sets_key)
            chat |= {f"{SETS}/{name}": own for name, own in scored.items()}
    return Encoded(
        train=made["train"],
        validation=made["validation"],
        test=made.get("test"),
        content_hash=key,
        tokens_per_row=_token_count(counted) / len(counted),
        evaluation_sets=sets,
        stream=stream,
        chat=chat,
    )


def encode_rows(
    rows: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    *,
    content_hash: str,
    cache_dir: Path,
) -> tuple[dict[str, Dataset], str]:
    """Encode rows of text like `encode_splits`, and return the encoded rows by name, and the key.

    Args:
        rows: rows by name, which messages use; all rows have the same columns.
        tokenizer: the tokenizer; the key contains its content, not its name.
        task: the task; only `type`, `max_length` and `whole_word_masking` are used.
        content_hash: hash of the sources of the rows.
        cache_dir: folder that contains the folder named by the key.

    Raises:
        DataError: see `encode_splits`.
    """
    check_room_for_text(next(iter(rows.values())), tokenizer, task)
    key = encoded_key(rows, tokenizer, task, content_hash=content_hash)
    if any(map(is_chat, rows.values())):
        return encode_chat(rows, tokenizer, task, key=key, cache_dir=cache_dir), key
    tables = {
        name: with_tokens(tables_of(split, tokenizer, task), split, split=name)
        for name, split in rows.items()
    }
    return cached_tables(tables, key, cache_dir=cache_dir), key


def cached_tables(
    tables: Mapping[str, Iterable[pa.Table]], key: str, *, cache_dir: Path
) -> dict[str, Dataset]:
    """Return encoded rows by name, memory-mapped.

    Args:
        tables: the tables of each file; only read if the folder of the key does not exist.
        key: hash of everything that the tables depend on.
        cache_dir: folder that contains the folder named by the key.

    Raises:
        DataError: the cache cannot be written.
    """

    def build(folder: Path) -> None:
        logger.info("encoding the rows of %s", ", ".join(tables))
        for name, made in tables.items():
            write_tables(folder / f"{name}.arrow", made)

    folder = whole_folder(cache_dir / "encoded" / key, build)
    return {name: read_rows(folder / f"{name}.arrow") for name in tables}


def tokens_key(rows: Dataset) -> str:
    """Return a sha256 of the model inputs in all rows of an encoded split, in order.

    The hash does not depend on labels or on the choice of held-out rows.
    """
    names = sorted(set(rows.column_names) - {"label", "labels"})
    digest = hashlib.sha256()
    for table in arrow_batches(rows.select_columns(names), ROWS_AT_ONCE):
        for name, (values, lengths) in sorted(columns_of(table).items()):
            digest.update(f"{name} {len(lengths)}".encode())
            digest.update(lengths.astype(np.int64).tobytes())
            digest.update(values.astype(np.int64).tobytes())
    return digest.hexdigest()


def labelled_only(rows: Dataset) -> Dataset:
    """Return the rows that carry a label, memory-mapped; all rows for language tasks.

    Raises:
        DataError: no row carries a label.
    """
    if "label" not in rows.column_names:
        return rows
    tables = arrow_batches(rows.select_columns("label"), LABELS_AT_ONCE)
    labels = np.concatenate([table.column("label").to_numpy() for table in tables])
    carries = ~np.isnan(labels) if labels.dtype.kind == "f" else labels != IGNORE
    if not carries.any():
        raise DataError(
            f"none of the {len(rows)} training rows has a label, and this stage learns only from "
            "labels; check task.label_column, or train without this stage"
        )
    return rows if carries.all() else rows.select(np.flatnonzero(carries))


class Collator:
    """A function that collates rows to one padded micro-batch.

    For causal_lm, `inputs` has `input_ids` and `position_ids`, and the model must be called with
    `use_cache=False`; see `packing`. A row without `position_ids` is one document. A column
    `is_rollout`, with one bool per row, fills `Batch.is_rollout`, and a column `route`, with one
    number per row, fills `Batch.routes`. For mlm, no tokens are masked or
    labelled yet; see `masking`, which also takes `word_starts` out of `inputs`.
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
        if not len(lengths):
            raise ValueError("a micro-batch needs at least one row, which may be a dummy row")
        width = padded_width(int(lengths.max()), self._max_length)
        valid = np.arange(width) < lengths[:, None]  # [B, T]
        padded = {
            name: self._padded(name, values, valid)
            for name, (values, _) in columns.items()
            if name in _PADDED
        }
        if self._type == "causal_lm":
            batch = _language_batch(padded, valid, lengths)
            batch = batch._replace(is_rollout=_rollout_positions(columns, valid))
        else:
            batch = self._text_batch(padded, columns, valid)
        return batch._replace(routes=_routes(columns, valid))

    def _padded(self, name: str, values: NDArray, valid: NDArray) -> NDArray[np.int64]:
        padded = np.full(valid.shape, _FILL.get(name, self._pad_id), dtype=np.int64)
        padded[valid] = values
        return padded

    def _text_batch(self, padded: dict[str, NDArray], columns: Columns, valid: NDArray) -> Batch:
        """Return a batch in which a dummy row attends to its first position, to avoid NaN."""
        attention = valid.astype(np.int64)
        attention[~valid.any(axis=1), 0] = 1
        inputs = {"attention_mask": torch.from_numpy(attention)}
        inputs |= {name: torch.from_numpy(values) for name, values in padded.items()}
        labels = self._labels(columns, valid.shape)
        return Batch(inputs, torch.from_numpy(labels), torch.from_numpy(valid))

    def _labels(self, columns: Columns, shape: tuple[int, ...]) -> NDArray:
        """Return [B] labels; for mlm [B, T], all -100 because no token is masked yet."""
        if self._type == "mlm":
            return np.full(shape, IGNORE, dtype=np.int64)
        if self._type == "regression":
            labels = np.full(shape[0], np.nan, dtype=np.float32)
        else:
            labels = np.full(shape[0], IGNORE, dtype=np.int64)
        given, _ = columns.get("label", _NOTHING)
        labels[: len(given)] = given
        return labels


def padded_width(longest: int, most: int) -> int:
    """Return the positions of a padded row: a multiple of 8, at least 8, but at most `most`."""
    rounded = -(-max(longest, 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return min(rounded, most)


def _rollout_positions(columns: Columns, valid: NDArray) -> torch.Tensor | None:
    """Return [B, T] bool: True at the tokens of generated texts; None without such a column."""
    if "is_rollout" not in columns:
        return None
    generated, _ = columns["is_rollout"]
    positions = valid.copy()
    positions[: len(generated)] &= generated.astype(bool)[:, None]
    return torch.from_numpy(positions)


def _routes(columns: Columns, valid: NDArray) -> torch.Tensor | None:
    """Return [B, T] int64: the number of each row's teacher; 0 at padding, or None without it."""
    if ROUTE not in columns:
        return None
    numbers, _ = columns[ROUTE]
    routes = np.zeros(valid.shape, dtype=np.int64)
    routes[: len(numbers)] = numbers.astype(np.int64)[:, None]
    return torch.from_numpy(np.where(valid, routes, 0))


def _language_batch(padded: dict[str, NDArray], valid: NDArray, lengths: NDArray) -> Batch:
    """Return a batch with [B, T] labels; positions restart at padding, which no token sees."""
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


Columns = dict[str, "tuple[NDArray, NDArray]"]
"""Column name -> (values of all rows concatenated, number of values per row)."""
_NOTHING = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


def columns_of(rows: object) -> Columns:
    """Return the columns of rows given as an arrow table, a mapping of columns or a sequence."""
    if isinstance(rows, pa.Table):
        table = cast("Any", rows)  # pyarrow carries no types
        return {name: _from_arrow(table.column(name)) for name in table.column_names}
    if not isinstance(rows, Mapping):
        listed = cast("Sequence[Mapping[str, object]]", rows)
        rows = {name: [row[name] for row in listed] for name in listed[0]} if listed else {}
    by_name = cast("Mapping[str, Sequence[object]]", rows)
    return {name: _from_values(values) for name, values in by_name.items() if len(values)}


def _from_arrow(column: pa.ChunkedArray) -> tuple[NDArray, NDArray]:
    array = column.combine_chunks()
    if pa.types.is_list(array.type):
        return array.flatten().to_numpy(), array.value_lengths().to_numpy()
    return array.to_numpy(zero_copy_only=False), np.ones(len(array), dtype=np.int64)


def _from_values(values: Sequence[object]) -> tuple[NDArray, NDArray]:
    arrays = [np.atleast_1d(np.asarray(value)) for value in values]
    return np.concatenate(arrays), np.array([len(array) for array in arrays])


def _named(splits: Splits) -> tuple[tuple[str, Dataset | None], ...]:
    train = splits.train if splits.stream is None else None
    return (("train", train), ("validation", splits.validation), ("test", splits.test))


def _token_count(rows: Dataset) -> int:
    column = rows.data.column("input_ids")
    return sum(len(chunk.flatten()) for chunk in column.chunks)
