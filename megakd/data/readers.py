"""Strict, streaming readers of local files: csv, tsv, parquet and lines of text.

A text file that is not UTF-8 is refused with the number of the line. A csv file may have quoted
fields (RFC 4180). A tsv file has no quoting: `"` is a character of the text, as in GLUE's files.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, LargeList, List, Value
from datasets.features.features import decode_nested_example, require_decoding

from megakd.data.cache import remembered_of
from megakd.data.tables import SPLIT_ALIASES, Record, SplitName, Table
from megakd.errors import DataError
from megakd.storage.atomic import sha256_of

BOM = b"\xef\xbb\xbf"
PARQUET_BATCH_ROWS = 1000
# Values of any kind, stored as JSON text; the first versions of `datasets` 4 do not have it.
JSON_FEATURE = getattr(datasets, "Json", Value)


Digest = Callable[[Path], str]
"""A function that returns a hash of a file."""


def digest_of(path: Path) -> str:
    """Return the sha256 of a file.

    Raises:
        DataError: the file cannot be read.
    """
    with readable(path):
        return remembered_of(path, lambda: sha256_of(path), "sha256")


def read_csv(path: Path, *, digest: Digest = digest_of) -> Table:
    """Read a csv file with a header; fields may be quoted and contain line breaks."""
    return _with_header(path, _csv_fields, digest=digest)


def read_tsv(
    path: Path,
    *,
    header: Sequence[str] | None = None,
    skip_broken: bool = False,
    digest: Digest = digest_of,
) -> Table:
    """Read a tsv file without quoting.

    Args:
        path: the file.
        header: names of the columns if the file has no header.
        skip_broken: whether lines with a wrong number of fields are skipped instead of refused.
        digest: function that returns the hash of the file.
    """
    return _with_header(path, _tsv_fields, header=header, skip_broken=skip_broken, digest=digest)


def by_split(names: Iterable[str], place: str) -> dict[SplitName, str]:
    """Return the name of every split among names; names that mean no split are left out.

    Raises:
        DataError: two names mean the same split.
    """
    found: dict[SplitName, str] = {}
    for name in names:
        split = SPLIT_ALIASES.get(name)
        if split is None:
            continue
        if split in found:
            raise DataError(
                f"{place}: {found[split]!r} and {name!r} are names of the same split ({split}); "
                f"keep one of them, or put the rows to use into a file and set task.{split}_files"
            )
        found[split] = name
    return found


def read_parquet(path: Path, *, digest: Digest = digest_of) -> Table:
    """Read a parquet file, and the class names that `datasets` may have stored in its schema."""
    with _parquet_errors(path):
        schema = pq.read_schema(path)
        features = Features.from_arrow_schema(schema)
    # Of the plain features, only JSON is stored in another form.
    coded = {n: kind for n, kind in features.items() if is_plain(kind) and require_decoding(kind)}
    return Table(
        name=str(path),
        columns=tuple(schema.names),
        records=partial(_parquet_records, path, coded),
        # The cache of an earlier version may hold rows whose JSON was not decoded.
        digest=":".join([digest(path), *coded]),
        class_names=class_names_of(features),
    )


def is_plain(feature: object) -> bool:
    """Return whether a column holds texts, numbers, classes or JSON, or lists or objects of it."""
    if isinstance(feature, List | LargeList):
        return is_plain(feature.feature)
    if isinstance(feature, dict):
        return all(map(is_plain, cast("dict[str, object]", feature).values()))
    return isinstance(feature, Value | ClassLabel | JSON_FEATURE)


def joined(tables: Sequence[Table], name: str) -> Table:
    """Return the concatenation of tables, such as the shards of one split.

    Raises:
        DataError: the columns of two tables differ, or the class names of a column.
    """
    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            raise DataError(
                f"{table.name} has the columns {', '.join(table.columns)}, but {first.name} has "
                f"{', '.join(first.columns)}; all files need the same columns"
            )
    numberings = [_numberings(table, first) for table in tables]

    def records() -> Iterator[Record]:
        for table, numbering in zip(tables, numberings, strict=True):
            for record in table.records():
                values = _renumbered(record.values, numbering) if numbering else record.values
                yield Record(f"{Path(table.name).name} {record.place}", values)

    return Table(
        name=name,
        columns=first.columns,
        records=records,
        digest=":".join(table.digest for table in tables),
        class_names=first.class_names,
    )


def _numberings(table: Table, first: Table) -> dict[str, tuple[int, ...]]:
    """Return, by column, the number in `first` of each class of `table` of another order."""
    numberings: dict[str, tuple[int, ...]] = {}
    for column in sorted({*first.class_names, *table.class_names}):
        expected, own = (part.class_names.get(column, ()) for part in (first, table))
        if sorted(own) != sorted(expected):
            raise DataError(
                f"{table.name}: column {column!r} has {_names_in_words(own)}, but in {first.name} "
                f"it has {_names_in_words(expected)}; write all files with the same class names"
            )
        if own != expected:
            numberings[column] = tuple(map(expected.index, own))
    return numberings


def _names_in_words(names: Sequence[str]) -> str:
    return f"the class names {', '.join(names)}" if names else "no class names"


def _renumbered(
    values: Mapping[str, object], numberings: Mapping[str, tuple[int, ...]]
) -> dict[str, object]:
    """Return a row with the class numbers of the first file; other numbers stay (-1: no class)."""
    changed = dict(values)
    for column, numbers in numberings.items():
        value = values.get(column)
        if isinstance(value, int) and 0 <= value < len(numbers):
            changed[column] = numbers[value]
    return changed


def class_names_of(features: Features) -> dict[str, tuple[str, ...]]:
    """Return the class names by column, for columns with class names."""
    return {
        name: tuple(feature.names)
        for name, feature in features.items()
        if isinstance(feature, ClassLabel) and feature.names
    }


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Convert system errors about a file into a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, with line ends and without a byte order mark.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8.
    """
    with readable(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            raw = line.removeprefix(BOM) if number == 1 else line
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: text is not UTF-8 (byte 0x{raw[error.start]:02x} at "
                    f"position {error.start}); convert the file to UTF-8"
                ) from error


def _with_header(
    path: Path,
    fields_of: Callable[[Path], Iterator[tuple[int, list[str]]]],
    *,
    header: Sequence[str] | None = None,
    skip_broken: bool = False,
    digest: Digest,
) -> Table:
    _, first = next(fields_of(path), (0, []))
    columns = tuple(header or first)
    doubled = sorted({name for name in columns if columns.count(name) > 1})
    if doubled:
        raise DataError(
            f"{path}: column {doubled[0]!r} occurs more than once; rename or remove one of the "
            "columns"
        )

    def records() -> Iterator[Record]:
        rows = fields_of(path)
        if header is None:
            next(rows, None)
        for number, values in rows:
            if len(values) == len(columns):
                yield Record(f"line {number}", dict(zip(columns, values, strict=True)))
            elif not skip_broken:
                raise DataError(
                    f"{path}, line {number}: {len(values)} fields, but there are {len(columns)} "
                    f"columns ({', '.join(columns)})"
                )

    return Table(name=str(path), columns=columns, records=records, digest=digest(path))


def _csv_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    with _long_csv_fields():
        reader = csv.reader(text_lines(path), strict=True)
        while True:
            first_line = reader.line_num + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}, line {first_line}: not valid CSV: {error}") from error
            if values is None:
                return
            if values:
                yield first_line, values


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    # `csv` refuses fields of more than 131072 characters by default; documents may be longer.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _tsv_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text_lines(path), start=1):
        if content := line.rstrip("\r\n"):
            yield number, content.split("\t")


def _parquet_records(path: Path, coded: Mapping[str, object]) -> Iterator[Record]:
    number = 0
    with _parquet_errors(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                decoded = {n: decode_nested_example(kind, row[n]) for n, kind in coded.items()}
                yield Record(f"row {number}", row | decoded)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        with readable(path):
            yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text is not UTF-8 ({error})") from error
    except (pa.ArrowException, ValueError) as error:  # ValueError: an unknown feature of datasets
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
