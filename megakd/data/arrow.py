"""Rows on disk: Arrow files in folders that are built once, whole or not at all.

The name of a folder is a hash of everything that its content depends on, so that a folder is never
outdated.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_fingerprint
from numpy.typing import NDArray

from megakd.config.paths import expand_path
from megakd.process.seals import read_signed, version_of, write_signed

T = TypeVar("T")
# Increase this number when a remembered value would differ.
VALUES = 3
TEXTS_AT_ONCE = 1000
# A string column of one record batch is limited to 2 GiB.
CHARACTERS_PER_BATCH = 64_000_000
Row = Mapping[str, object]
PLACE = "place"
"""Column with the place of a row in messages, on which nothing else depends."""


def key_of(*parts: object) -> str:
    """Return the sha256 of values that JSON can express, the same in every process."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def cache_folder() -> Path:
    """Return the folder of encoded data and built corpora, which `MEGAKD_CACHE` can change."""
    return expand_path(os.environ.get("MEGAKD_CACHE") or "~/.cache/megakd")


def remembered(compute: Callable[[], T], *parts: object) -> T:
    """Return a value that JSON can express, computed once for all `parts` that it depends on."""
    value = recalled(*parts)
    if value is None:
        value = compute()
        remember(value, *parts)
    return value


def recalled(*parts: object) -> Any:
    """Return the value that is stored for these parts; None: none is."""
    with suppress(OSError, ValueError):
        return read_signed(_place_of(parts))["value"]
    return None


def remember(value: object, *parts: object) -> None:
    """Store a value that JSON can express, if the cache can be written."""
    with suppress(OSError):
        write_signed(_place_of(parts), {"value": value})


def _place_of(parts: Sequence[object]) -> Path:
    return cache_folder() / "values" / f"{key_of(VALUES, *parts)[:32]}.json"


def remembered_of(path: Path, compute: Callable[[], T], *parts: object) -> T:
    """Return what `compute` reads from a file, without reading a file that has not changed."""
    version = version_of(path)
    return compute() if version is None else remembered(compute, version, *parts)


def write_tables(path: Path, tables: Iterable[pa.Table]) -> bool:
    """Write tables in Arrow's stream format, which `datasets` can memory-map, if there are any."""
    writer = None
    with pa.OSFile(str(path), "wb") as sink:
        for table in tables:
            writer = writer or pa.ipc.new_stream(sink, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    return writer is not None


def read_rows(path: Path) -> Dataset:
    """Return the rows of an Arrow file, memory-mapped."""
    return Dataset.from_file(str(path))


def tables_of_rows(rows: Iterable[Row], features: Features) -> Iterator[pa.Table]:
    """Yield rows as tables for a file that `read_rows` can read."""
    table, schema = cast("Any", pa).Table, features.arrow_schema  # pyarrow carries no types
    pending: list[Row] = []
    characters = 0
    for row in rows:
        pending.append(row)
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(pending) == TEXTS_AT_ONCE or characters > CHARACTERS_PER_BATCH:
            yield table.from_pylist(pending, schema)
            pending, characters = [], 0
    yield table.from_pylist(pending, schema)  # an empty last table gives an empty file its columns


def arrow_batches(rows: Dataset, size: int) -> Iterator[pa.Table]:
    """Yield all rows in order, `size` rows at a time."""
    return cast("Iterator[pa.Table]", rows.with_format("arrow").iter(batch_size=size))


def column_of(rows: Dataset, name: str) -> NDArray:
    """Return [N] the values of a column in all rows."""
    return np.asarray(rows.select_columns(name).with_format("numpy")[:][name])


def with_column(rows: Dataset, name: str, values: NDArray) -> Dataset:
    """Return rows whose column is one of numbers [N], or of equally many [N, C] in every row."""
    kind, rows = Value(str(values.dtype)), rows.remove_columns(name)
    if values.ndim == 1:
        return rows.add_column(name, values, feature=kind)
    of_all: Any = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return rows.add_column(name, of_all, feature=List(kind, length=values.shape[1]))


def rows_key(rows: Dataset) -> str:
    """Return a hash of all values of all rows but their place, in order."""
    return remembered_of_rows(rows, "key", lambda: _rows_key(rows))


def remembered_of_rows(rows: Dataset, what: object, compute: Callable[[], T]) -> T:
    """Return what `compute` reads from rows, which are known by their file and their numbers."""
    return remembered(compute, what, generate_fingerprint(rows))


def _rows_key(rows: Dataset) -> str:
    digest = hashlib.sha256(f"{len(rows)} {sorted(rows.column_names)}".encode())
    names = sorted({*rows.column_names} - {PLACE})
    for table in arrow_batches(rows.select_columns(names), TEXTS_AT_ONCE):
        # Arrow's format for other processes depends on the values, not on how they are stored.
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.replace_schema_metadata(None).serialize())
    return digest.hexdigest()


def longest_of(lengths: NDArray | list[int], share: float = 1.0) -> int:
    """Return the smallest length that this share of the rows does not exceed; 0 without rows."""
    return int(np.quantile(lengths, share, method="inverted_cdf")) if len(lengths) else 0
