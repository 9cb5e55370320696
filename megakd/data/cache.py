"""Rows on disk: Arrow files in folders that are built once, whole or not at all.

The name of a folder is a hash of everything that its content depends on, so that a folder is never
outdated. The ranks of a node may request the same folder at the same time: the first rank builds
the folder, and the others wait for its lock. The system releases the lock if a process dies.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock

from megakd.errors import DataError
from megakd.storage.checksums import read_signed, version_of, write_signed
from megakd.storage.folders import is_whole, whole_folder

T = TypeVar("T")
# Increase this number when a remembered value would differ.
VALUES = 1
ROWS_PER_BATCH = 1000
# A string column of one record batch is limited to 2 GiB.
CHARACTERS_PER_BATCH = 64_000_000

Row = Mapping[str, object]


def key_of(*parts: object) -> str:
    """Return the sha256 of values that JSON can express, the same in every process."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def cache_folder() -> Path:
    """Return the folder of encoded data and built corpora, which `MEGAKD_CACHE` can change."""
    return Path(os.environ.get("MEGAKD_CACHE") or "~/.cache/megakd").expanduser()


def remembered(compute: Callable[[], T], *parts: object) -> T:
    """Return a value that JSON can express, computed once for all `parts` that it depends on."""
    path = cache_folder() / "values" / f"{key_of(VALUES, *parts)[:32]}.json"
    with suppress(OSError, ValueError):
        return read_signed(path)["value"]
    value = compute()
    with suppress(OSError):  # without the file, the next start computes the value again
        write_signed(path, {"value": value})
    return value


def remembered_of(path: Path, compute: Callable[[], T], *parts: object) -> T:
    """Return what `compute` reads from a file, without reading a file that has not changed."""
    version = version_of(path)
    return compute() if version is None else remembered(compute, version, *parts)


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return `folder`, and fill it with `fill` if it does not exist; other processes wait.

    Raises:
        DataError: the folder cannot be written.
    """
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder.with_name(f"{folder.name}.lock")).acquire()
    except OSError as error:
        raise DataError(
            f"cannot write the data cache {folder}: {error.strerror or error}; "
            "make the folder writable or choose another output_dir"
        ) from error
    with held:
        return whole_folder(folder, fill)


def write_rows(rows: Iterable[Row], features: Features, path: Path) -> None:
    """Write rows as a stream into an Arrow file that `read_rows` can read."""
    with ArrowWriter(features=features, path=str(path)) as writer:
        for batch in _batches(rows, tuple(features)):
            writer.write_batch(batch)
        writer.finalize()


def write_tables(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables in Arrow's stream format, which `datasets` can memory-map."""
    writer = None
    with pa.OSFile(str(path), "wb") as sink:
        for table in tables:
            writer = writer or pa.ipc.new_stream(sink, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def read_rows(path: Path) -> Dataset:
    """Return the rows of an Arrow file, memory-mapped."""
    return Dataset.from_file(str(path))


def _batches(rows: Iterable[Row], columns: tuple[str, ...]) -> Iterator[dict[str, list[object]]]:
    pending: list[Row] = []
    characters = 0
    for row in rows:
        pending.append(row)
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(pending) == ROWS_PER_BATCH or characters > CHARACTERS_PER_BATCH:
            yield {name: [row[name] for row in pending] for name in columns}
            pending, characters = [], 0
    # An empty last batch gives an empty file its columns.
    yield {name: [row[name] for row in pending] for name in columns}
