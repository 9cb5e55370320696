"""Rows of a split as arrow batches, without a Python object per value, and a key of the rows."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    from datasets import Dataset

SAMPLED_ROWS = 64
LABELS_AT_ONCE = 100_000


def arrow_batches(rows: Dataset, size: int) -> Iterator[pa.Table]:
    """Yield all rows in order, `size` rows at a time."""
    return cast("Iterator[pa.Table]", rows.with_format("arrow").iter(batch_size=size))


def rows_key(rows: Dataset) -> str:
    """Return a hash of the number of rows, of all labels, and of the texts of some rows.

    The content hash of the sources may be equal for two selections from the same source, so the
    hash is computed from the rows. All labels are included, because the set of labelled rows may be
    the only difference.
    """
    digest = hashlib.sha256(f"{len(rows)} {sorted(rows.column_names)}".encode())
    if "label" in rows.column_names:
        for table in arrow_batches(rows.select_columns("label"), LABELS_AT_ONCE):
            digest.update(table.column("label").to_numpy().tobytes())
    count = min(SAMPLED_ROWS, len(rows))
    sampled = np.linspace(0, len(rows) - 1, count, dtype=np.int64)
    for table in arrow_batches(rows.select(sampled), SAMPLED_ROWS):
        digest.update(json.dumps(table.to_pylist()).encode())
    return digest.hexdigest()
