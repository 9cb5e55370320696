"""Conversion of rows of text to arrow tables of token numbers, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from megakd.contract.routes import ROUTE, teacher_number
from megakd.data.packing import PackedRow, pack
from megakd.data.row_routes import names_of
from megakd.data.rows import arrow_batches
from megakd.data.windows import windows
from megakd.data.words import WORD_STARTS, check_words, word_starts
from megakd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from megakd.config.task import TaskConfig

TEXTS_AT_ONCE = 1000
_IDS = pa.list_(pa.int32())


def with_tokens(tables: Iterable[pa.Table], rows: Dataset, *, split: str) -> Iterator[pa.Table]:
    """Yield the tables of encoded rows, at least one table.

    Args:
        tables: the tables.
        rows: the texts that the tables are made of.
        split: name of the rows in messages.

    Raises:
        DataError: there are no tables.
    """
    empty = True
    for table in tables:
        empty = False
        yield table
    if empty:
        raise no_tokens(rows, split)


def no_tokens(rows: Dataset, split: str) -> DataError:
    """Return the error of rows that have no tokens."""
    return DataError(
        f"the {split} split has {len(rows)} rows and no tokens; check that task.text_columns names "
        "the text and that the text is not blank"
    )


def check_room_for_text(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> None:
    """Raise if the tokenizer's special tokens fill the rows of a task.

    Raises:
        DataError: `max_length` leaves no room for text.
    """
    if task.type == "causal_lm":
        return
    is_pair = "text_pair" in rows.column_names
    special = tokenizer.num_special_tokens_to_add(pair=is_pair)
    if task.row_length <= special:
        raise DataError(
            f"task.max_length is {task.row_length}, but the tokenizer adds {special} special "
            f"tokens to every {'pair' if is_pair else 'text'}, which leaves no room for text; "
            f"raise task.max_length above {special}"
        )


def tables_of(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> Iterator[pa.Table]:
    """Yield tables of encoded rows, and no table if there are no tokens.

    Args:
        rows: texts, and labels if the task has labels.
        tokenizer: a tokenizer, whose special tokens are added to every text.
        task: the task; only `type`, `max_length` and `whole_word_masking` are used.
    """
    make = {"causal_lm": _packed_tables, "mlm": _window_tables}.get(task.type, _text_tables)
    if make is _text_tables or ROUTE not in rows.column_names:
        return make(rows, tokenizer, task)
    # A packed row and a window have one teacher, so the texts of each teacher are packed apart.
    return (
        table.append_column(ROUTE, numbers_of([name] * len(table)))
        for name, own in rows_by_route(rows)
        for table in make(own, tokenizer, task)
    )


def rows_by_route(rows: Dataset) -> Iterator[tuple[str, Dataset]]:
    """Yield each teacher that rows name, in the order of the names, with its rows."""
    found = names_of(rows)
    for name in np.unique(found).tolist():
        yield name, rows.select(np.flatnonzero(found == name))


def numbers_of(names: Sequence[str]) -> Any:
    """Return the numbers of teachers as an arrow array."""
    return pa.array(list(map(teacher_number, names)), type=pa.int64())


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
            max_length=task.row_length,
            return_token_type_ids="token_type_ids" in columns,
            return_attention_mask=False,
        )
        made = {name: pa.array(encoded[name], type=_IDS) for name in columns}
        made["label"] = batch.column("label").combine_chunks().cast(label_type)
        if ROUTE in batch.column_names:
            made[ROUTE] = numbers_of(batch.column(ROUTE).to_pylist())
        yield pa.table(made)


def _packed_tables(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> Iterator[pa.Table]:
    return tables_of_lists(pack(documents_of(rows, tokenizer), task.row_length), PackedRow._fields)


def documents_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the tokens of every text that is not empty, as documents of causal_lm."""
    prefix, suffix = document_ends(tokenizer)
    yield from (prefix + ids + suffix for ids, _ in _texts(rows, tokenizer))


def _window_tables(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> Iterator[pa.Table]:
    names = ("input_ids", WORD_STARTS) if task.whole_word_masking else ("input_ids",)
    return tables_of_lists(_window_rows(rows, tokenizer, task), names)


def _window_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> Iterator[tuple[list[int], ...]]:
    """Yield the tokens of each window, and the starts of their words if the task asks for them."""
    prefix, suffix = frame(tokenizer)
    room = task.row_length - len(prefix) - len(suffix)
    for ids, starts in _texts(rows, tokenizer, with_words=task.whole_word_masking):
        for window in windows(range(len(ids)), room):
            here = slice(window[0], window[-1] + 1)
            row = [*prefix, *ids[here], *suffix]
            if starts is None:
                yield (row,)
            else:
                yield row, _row_starts(starts[here], window[0], len(prefix), len(row))


def _row_starts(starts: Sequence[int], first: int, before: int, length: int) -> list[int]:
    inside = [before + max(0, start - first) for start in starts]
    return [*range(before), *inside, *range(before + len(inside), length)]


def tables_of_lists(rows: Iterable[tuple[Any, ...]], names: Sequence[str]) -> Iterator[pa.Table]:
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


def _texts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, with_words: bool = False
) -> Iterator[tuple[list[int], list[int] | None]]:
    """Yield the tokens of each text that is not empty, without special tokens, and its words.

    The second value is None without `with_words`, else see `words.word_starts`.
    """
    if with_words:
        check_words(tokenizer)
    for batch in arrow_batches(rows, TEXTS_AT_ONCE):
        texts = batch.column("text").to_pylist()
        encoded = plain_encoding(texts, tokenizer)
        starts = word_starts(encoded, texts) if with_words else repeat(None)
        yield from ((ids, own) for ids, own in zip(encoded["input_ids"], starts) if ids)  # noqa: B905


def plain_encoding(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Return the encoding of whole texts, without special tokens."""
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )


def document_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a document, which always ends with eos."""
    prefix, suffix = frame(tokenizer)
    eos = tokenizer.eos_token_id
    if eos is not None and suffix[-1:] != [eos]:
        suffix = [*suffix, eos]
    return prefix, suffix


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer adds before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]
