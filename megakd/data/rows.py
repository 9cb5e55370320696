"""A split's rows without a Python object per value: as arrow batches, and as a key."""

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
    """All rows in order, `size` at a time."""
    return cast("Iterator[pa.Table]", rows.with_format("arrow").iter(batch_size=size))


def rows_key(rows: Dataset) -> str:
    """A key of what the rows hold: their number, all labels, and the texts of some.

    The content hash of the sources need not tell two cuts of one source apart, so the rows are
    looked at themselves; all labels, since which rows carry one may be the only difference.
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
