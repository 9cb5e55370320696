"""Selection of rows by a hash of their text, independent of machine and order of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from megakd.contract.batch import IGNORE
from megakd.data.arrow import (
    TEXTS_AT_ONCE,
    arrow_batches,
    column_of,
    remembered_of_rows,
    with_column,
)
from megakd.data.chat.conversations import CONVERSATION, Conversation
from megakd.errors import DataError

VALIDATION_FRACTION = 0.05
HASH_RANGE = 2**64


def text_hash(text: str, *, salt: str = "") -> int:
    """Return a number below 2**64 that depends only on the text and the salt."""
    digest = hashlib.sha256(f"{salt}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def row_keys(rows: Dataset, *, salt: str = "") -> NDArray[np.uint64]:
    """Return one hash per row, of the text or the pair of texts."""
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    texts = ("\0".join(row) for row in _values(rows, columns))
    return np.fromiter((text_hash(text, salt=salt) for text in texts), dtype=np.uint64)


def prompt_keys(rows: Dataset) -> NDArray[np.uint64]:
    """Return one hash per row, of the prompt of a conversation, or else of the text."""
    if CONVERSATION not in rows.column_names:
        return row_keys(rows)
    asked = (Conversation.from_json(text).asked for (text,) in _values(rows, [CONVERSATION]))
    return np.fromiter(map(text_hash, asked), dtype=np.uint64)


def _values(rows: Dataset, columns: list[str]) -> Iterator[tuple[str, ...]]:
    for batch in arrow_batches(rows.select_columns(columns), TEXTS_AT_ONCE):
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def is_labelled(rows: Dataset) -> NDArray[np.bool_]:
    """Return a bool per row: whether the row carries a label."""
    if "label" not in rows.column_names:
        return np.ones(len(rows), dtype=np.bool_)
    labels = column_of(rows, "label")
    labels = labels[:, 0] if labels.ndim == 2 else labels  # 0 or 1 for every class
    return ~np.isnan(labels) if labels.dtype.kind == "f" else labels != IGNORE


def cut_validation(rows: Dataset, *, name: str) -> tuple[Dataset, Dataset]:
    """Split the training rows into (rest, validation), with 5 % of the labelled rows, at least one.

    Rows with equal text stay together, and so do all answers to a prompt, so that no held-out text
    or prompt is trained on. A prompt with more than 5 % of the rows is not held out, if another is.
    """
    held, left_out = remembered_of_rows(rows, "cut", lambda: _cut(rows, name))
    return rows.select(np.delete(np.arange(len(rows)), held + left_out)), rows.select(held)


def _cut(rows: Dataset, name: str) -> tuple[list[int], list[int]]:
    keys, prompts, labelled = row_keys(rows), prompt_keys(rows), is_labelled(rows)
    _, numbers, answers = np.unique(prompts, return_inverse=True, return_counts=True)
    # The hash of the text is kept where it is enough, as in the splits of earlier versions.
    keys = np.where(answers[numbers] > 1, prompts, keys)
    if not labelled.any() or len(answers) < 2:
        raise DataError(
            f"{name} has no validation split, and megakd cannot cut one from its {len(rows)} "
            "row(s), because a cut needs 2 different texts (or prompts) and at least one label; "
            "add a file validation.*"
        )
    _, numbers, rows_alike = np.unique(keys, return_inverse=True, return_counts=True)
    can_be = labelled & (rows_alike[numbers] <= max(1, VALIDATION_FRACTION * len(keys)))
    held = can_be & (keys < np.uint64(int(VALIDATION_FRACTION * HASH_RANGE)))
    alike = np.isin(keys, keys[held])
    if not held.any() or alike.all():
        lowest = keys[can_be if can_be.any() else labelled].min()
        held = labelled & (keys == lowest)
        alike = np.isin(keys, keys[held])
    return np.flatnonzero(held).tolist(), np.flatnonzero(alike & ~held).tolist()


def at_most(rows: Dataset, count: int | None) -> Dataset:
    """Return the `count` rows, labelled first, with the lowest hashes, in order; None: all rows."""
    if count is None or count >= len(rows):
        return rows

    def lowest() -> list[int]:
        order = np.lexsort((row_keys(rows), ~is_labelled(rows)))
        return np.sort(order[:count]).tolist()

    return rows.select(remembered_of_rows(rows, ("lowest", count), lowest))


def keep_labels(rows: Dataset, count: int | None, *, seed: int, name: str) -> Dataset:
    """Return the rows with only `count` labels, chosen by a hash of seed and text."""
    if count is None:
        return rows
    candidates = np.flatnonzero(is_labelled(rows))
    if count > candidates.size:
        raise DataError(
            f"task.labelled_examples: {count}, but the training split of {name} has "
            f"{candidates.size} labelled rows; set at most that number"
        )
    keys = row_keys(rows, salt=str(seed))[candidates]
    # Equal texts have equal keys: the earlier row is chosen first.
    kept = candidates[np.argsort(keys, kind="stable")[:count]]
    labels = column_of(rows, "label")
    fewer = np.full_like(labels, np.nan if labels.dtype.kind == "f" else IGNORE)
    fewer[kept] = labels[kept]
    # Of several labels, the column holds int8, and NumPy's format int64.
    return with_column(rows, "label", fewer if fewer.ndim == 1 else fewer.astype(np.int8))
