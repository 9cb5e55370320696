"""Rows on disk: Arrow files in folders that are built once, whole or not at all.

The name of a folder is a hash of everything that its content depends on, so that a folder is never
outdated. Tables of rows are checked and joined on the way there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_fingerprint
from numpy.typing import NDArray

from megakd.config.paths import without_compression
from megakd.errors import DataError, listed
from megakd.process.files import read_signed, version_of, write_signed
from megakd.process.terminal import in_home

logger = logging.getLogger(__name__)

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
    return in_home(os.environ.get("MEGAKD_CACHE") or "~/.cache/megakd")


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


MOST_NAMED = 20
SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation", "test")
SPLIT_ALIASES: Mapping[str, SplitName] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


class Record(NamedTuple):
    """One row: its place in messages, such as `line 7`, and values by column; None is missing."""

    place: str
    values: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A split whose text and label columns are not yet chosen.

    records: function that reads all rows from the beginning, with constant memory, and gives the
        error of a row that cannot be read in its place.
    digest: sha256 of the source of the rows.
    class_names: class names by column, if the data itself declares class names.
    """

    name: str
    columns: tuple[str, ...]
    records: Callable[[], Iterator[Record | DataError]]
    digest: str
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def require(table: Table, key: str, *columns: str) -> None:
    """Raise a DataError that names `key` if a table does not have one of the columns."""
    for column in (name for name in columns if name not in table.columns):
        raise DataError(
            f"{table.name}: column {column!r} ({key}) does not exist; the columns are "
            f"{', '.join(table.columns)}{no_header(table)}"
        )


def no_header(table: Table) -> str:
    """Return a question for messages about a table whose columns have the form of values."""
    is_text = without_compression(table.name).endswith((".csv", ".tsv"))
    is_value = (re.fullmatch(r"[-+.\d]+|.*\s\S+\s.*|.{40,}", name) for name in table.columns)
    return (
        " (no header line? the first line names the columns)" if is_text and any(is_value) else ""
    )


def document_of(name: str, columns: Sequence[str], record: Record) -> str:
    """Return the document of a row, with a line per column."""
    return "\n".join(text_of(name, column, record) for column in columns)


def text_of(name: str, column: str, record: Record) -> str:
    """Return the text in a column of a row."""
    text = record.values.get(column)
    if not isinstance(text, str):
        problem = "is missing" if text is None else f"is not text: {text!r}"
        raise DataError(f"{name}, {record.place}: column {column!r} {problem}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}, {record.place}: column {column!r} is not UTF-8: it holds half of a "
            f"surrogate pair at character {error.start}"
        ) from error
    return text


PLACES_OF_A_CAUSE = 3
CHARACTERS_OF_A_LINE = 300
_PLACE = re.compile(r"(?:[^\s,]+ )?(?:line|row) \d+")
_VALUES = re.compile(r"(?<!column )'[^']*'|\d+(?:\.\d+)?")
"""What errors with one cause have different."""


class BadRows(AbstractContextManager["BadRows"]):
    """A context that keeps the `DataError` of a row, so that the next rows are read too.

    Args:
        choice: `task.bad_rows`.
        named: the number of errors to raise together, the last of them at once; or to log, of
            which those with one cause are logged for its first three places.
    """

    def __init__(
        self, choice: Literal["error", "drop"] = "error", *, named: int = MOST_NAMED
    ) -> None:
        self._drops, self._named = choice == "drop", named
        self.count, self.errors = 0, list[str]()
        self._causes: dict[str, list[str]] = {}

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, DataError):
            return False
        text = str(error)
        self.count += 1
        if self.count <= self._named:
            same = self._causes.setdefault(_VALUES.sub("", text), [])
            if text not in same:  # a stream is read several times
                if self._drops and len(same) < PLACES_OF_A_CAUSE:
                    logger.warning("a row is left out (task.bad_rows: drop): %s", text)
                same.append(text)
        if not self._drops:
            self.errors.append(text)
            if self.count == self._named:
                self.finish()
        return True

    def finish(self) -> None:
        """Raise the kept errors as one with a line per cause, unless the rows are left out."""
        if self.count == 1 and self.errors:
            raise DataError(self.errors[0])
        if self.errors:
            raise DataError(
                f"{'the first ' if self.count == self._named else ''}{self.count} rows that cannot "
                "be used (correct them, or set task.bad_rows: drop to leave them out):\n  "
                + "\n  ".join(map(_line_of, self._causes.values()))
            )


def _line_of(errors: Sequence[str]) -> str:
    # The end of a message says what to do.
    text = errors[0]
    if len(text) > CHARACTERS_OF_A_LINE:
        text = f"{text[:190]} … {text[-105:]}"
    if len(errors) > 1:
        places = [match[0] for match in map(_PLACE.search, errors) if match]
        text += f" ({len(errors)} such rows: {listed(places, PLACES_OF_A_CAUSE)})"
    return text
