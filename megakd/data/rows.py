"""Rows of a split as arrow batches, without a Python object per value, and a key of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
from datasets.fingerprint import generate_fingerprint

from megakd.data.cache import T, remembered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pyarrow as pa
    from datasets import Dataset
    from numpy.typing import NDArray

LABELS_AT_ONCE = 100_000
TEXTS_AT_ONCE = 1000
PLACE = "place"
"""Column with the place of a row in messages, on which nothing else depends."""


def arrow_batches(rows: Dataset, size: int) -> Iterator[pa.Table]:
    """Yield all rows in order, `size` rows at a time."""
    return cast("Iterator[pa.Table]", rows.with_format("arrow").iter(batch_size=size))


def rows_key(rows: Dataset) -> str:
    """Return a hash of the number of rows, of all labels and of all texts, in order.

    The content hash of the sources may be equal for two selections from the same source, and for
    two choices of its text columns, so the hash is computed from the rows.
    """
    return remembered_of_rows(rows, "key", lambda: _rows_key(rows))


def remembered_of_rows(rows: Dataset, what: object, compute: Callable[[], T]) -> T:
    """Return what `compute` reads from rows, which are known by their file and their numbers."""
    return remembered(compute, what, generate_fingerprint(rows))


def _rows_key(rows: Dataset) -> str:
    digest = hashlib.sha256(f"{len(rows)} {sorted(rows.column_names)}".encode())
    if "label" in rows.column_names:
        for table in arrow_batches(rows.select_columns("label"), LABELS_AT_ONCE):
            digest.update(table.column("label").to_numpy().tobytes())
    names = sorted({*rows.column_names} - {"label", PLACE})
    for table in arrow_batches(rows.select_columns(names), TEXTS_AT_ONCE):
        # Arrow's format for other processes depends on the values, not on how they are stored.
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.replace_schema_metadata(None).serialize())
    return digest.hexdigest()


def longest_of(lengths: NDArray | Mapping[int, int], share: float = 1.0) -> int:
    """Return the smallest length that this share of the rows does not exceed; 0 without rows.

    Args:
        lengths: the length of each row, or the number of rows by length.
        share: the share.
    """
    if isinstance(lengths, Mapping):
        lengths = np.repeat(list(lengths), list(lengths.values()))
    return int(np.quantile(lengths, share, method="inverted_cdf")) if len(lengths) else 0
