"""Conversion of rows of text to arrow tables of token numbers, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from megakd.data.packing import pack
from megakd.data.rows import arrow_batches
from megakd.data.windows import windows
from megakd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from megakd.config.run import TaskConfig

TEXTS_AT_ONCE = 1000
_IDS = pa.list_(pa.int32())


def token_tables(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, *, split: str
) -> Iterator[pa.Table]:
    """Yield tables of encoded rows, at least one table.

    Args:
        rows: texts, and labels if the task has labels.
        tokenizer: a tokenizer, whose special tokens are added to every text.
        task: the task; only `type` and `max_length` are used.
        split: name of the rows in messages.

    Raises:
        DataError: the rows have no tokens.
    """
    make = {"causal_lm": _packed_tables, "mlm": _window_tables}.get(task.type, _text_tables)
    empty = True
    for table in make(rows, tokenizer, task):
        empty = False
        yield table
    if empty:
        raise DataError(
            f"the {split} split has {len(rows)} rows and no tokens; check that "
            f"task.text_columns names the text and that the text is not blank"
        )


def _text_tables(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> Iterator[pa.Table]:
    has_pair = "text_pair" in rows.column_names
    label_type = pa.float32() if task.type == "regression" else pa.int64()
    columns = ["input_ids"]
    if has_pair and "token_type_ids" in tokenizer.model_input_names:
        columns.append("token_type_ids")
    for batch in arrow_batches(rows, TEXTS_AT_ONCE):
        encoded = tokenizer(
            batch.column("text").to_pylist(),
            batch.column("text_pair").to_pylist() if has_pair else None,
            truncation=True,
            max_length=task.max_length,
            return_token_type_ids="token_type_ids" in columns,
            return_attention_mask=False,
        )
        made = {name: pa.array(encoded[name], type=_IDS) for name in columns}
        labels = batch.column("label").combine_chunks().cast(label_type)
        yield pa.table({**made, "label": labels})


def _packed_tables(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> Iterator[pa.Table]:
    prefix, suffix = document_ends(tokenizer)
    documents = (prefix + ids + suffix for ids in _texts(rows, tokenizer))
    names = ("input_ids", "position_ids", "labels")
    return _tables_of(pack(documents, task.max_length), names)


def _window_tables(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> Iterator[pa.Table]:
    prefix, suffix = _frame(tokenizer)
    room = task.max_length - len(prefix) - len(suffix)
    framed = (
        ([*prefix, *window, *suffix],)
        for ids in _texts(rows, tokenizer)
        for window in windows(ids, room)
    )
    return _tables_of(framed, ("input_ids",))


def _tables_of(rows: Iterable[tuple[Any, ...]], names: Sequence[str]) -> Iterator[pa.Table]:
    """Yield tables of rows in which every column is a list of token numbers."""
    batch: list[tuple[Any, ...]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == TEXTS_AT_ONCE:
            yield _table(batch, names)
            batch = []
    if batch:
        yield _table(batch, names)


def _table(rows: Sequence[tuple[Any, ...]], names: Sequence[str]) -> pa.Table:
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return pa.table({name: pa.array(list(arrays), type=_IDS) for name, arrays in columns})


def _texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the tokens of each text that is not empty, without special tokens."""
    for batch in arrow_batches(rows, TEXTS_AT_ONCE):
        encoded = tokenizer(
            batch.column("text").to_pylist(),
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        yield from (ids for ids in encoded["input_ids"] if ids)


def document_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a document, which always ends with eos."""
    prefix, suffix = _frame(tokenizer)
    eos = tokenizer.eos_token_id
    if eos is not None and suffix[-1:] != [eos]:
        suffix = [*suffix, eos]
    return prefix, suffix


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer adds before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]
