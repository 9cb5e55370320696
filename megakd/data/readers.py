"""Strict, streaming readers of local files: csv, tsv, jsonl, json, parquet and txt.

A text file that is not UTF-8 is refused with the number of the line. A csv file may have quoted
fields (RFC 4180). A tsv file has no quoting: `"` is a character of the text, as in GLUE's files.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from megakd.data.tables import SPLIT_ALIASES, Record, SplitName, Table
from megakd.errors import DataError
from megakd.storage.atomic import sha256_of

BOM = b"\xef\xbb\xbf"
PARQUET_BATCH_ROWS = 1000


def read_csv(path: Path) -> Table:
    """Read a csv file with a header; fields may be quoted and contain line breaks."""
    return _with_header(path, _csv_fields)


def read_tsv(
    path: Path, *, header: Sequence[str] | None = None, skip_broken: bool = False
) -> Table:
    """Read a tsv file without quoting.

    Args:
        path: the file.
        header: names of the columns if the file has no header.
        skip_broken: whether lines with a wrong number of fields are skipped instead of refused.
    """
    return _with_header(path, _tsv_fields, header=header, skip_broken=skip_broken)


def read_jsonl(path: Path) -> Table:
    """Read a file with one JSON object (or one string) per line."""
    columns: dict[str, None] = {}
    for record in _jsonl_records(path):
        columns.update(dict.fromkeys(record.values))
    return Table(
        name=str(path),
        columns=tuple(columns),
        records=partial(_jsonl_records, path),
        digest=digest_of(path),
    )


def read_json(path: Path) -> dict[SplitName, Table]:
    """Read a JSON list of strings, objects or [text, label], or a mapping from splits to lists."""
    tree = parse_json("".join(text_lines(path)), str(path))
    _refuse_doubled(tree, str(path))
    digest = digest_of(path)
    if isinstance(tree, list):
        return {"train": _listed(str(path), cast("list[object]", tree), digest)}
    if isinstance(tree, dict):
        lists = {
            name: cast("list[object]", rows)
            for name, rows in cast("dict[str, object]", tree).items()
            if isinstance(rows, list)
        }
        if found := by_split(lists, str(path)):
            return {
                split: _listed(f"{path} ({name})", lists[name], f"{digest}:{name}")
                for split, name in found.items()
            }
    raise DataError(
        f"{path} is neither a JSON list of rows nor an object with a list named 'train'; use the "
        "ending .jsonl for a file with one object per line"
    )


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


def read_parquet(path: Path) -> Table:
    """Read a parquet file, and the class names that `datasets` may have stored in its schema."""
    with _parquet_errors(path):
        schema = pq.read_schema(path)
        features = Features.from_arrow_schema(schema)
    return Table(
        name=str(path),
        columns=tuple(schema.names),
        records=partial(_parquet_records, path),
        digest=digest_of(path),
        class_names=class_names_of(features),
    )


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
    """Return, by column, the number in `first` of each class of `table` where their orders differ.

    Raises:
        DataError: a column has other class names in the two tables, or names in only one.
    """
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


def digest_of(path: Path) -> str:
    """Return the sha256 of a file.

    Raises:
        DataError: the file cannot be read.
    """
    with readable(path):
        return sha256_of(path)


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


class DoubledKeys(dict[str, object]):
    """A JSON object with a repeated key.

    key: the first repeated key.
    """

    def __init__(self, pairs: Sequence[tuple[str, object]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.key = next(name for name in names if names.count(name) > 1)


def parse_json(text: str, place: str) -> object:
    """Return the content of a JSON text; objects that repeat a key become `DoubledKeys`.

    Raises:
        DataError: the text is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_json_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}") from error


def _json_object(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else DoubledKeys(pairs)


def _refuse_doubled(tree: object, place: str) -> None:
    if isinstance(tree, DoubledKeys):
        raise DataError(
            f"{place}: the key {tree.key!r} occurs more than once; keep one of its values"
        )


def _with_header(
    path: Path,
    fields_of: Callable[[Path], Iterator[tuple[int, list[str]]]],
    *,
    header: Sequence[str] | None = None,
    skip_broken: bool = False,
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

    return Table(name=str(path), columns=columns, records=records, digest=digest_of(path))


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


def _jsonl_records(path: Path) -> Iterator[Record]:
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        row = parse_json(line, f"{path}, {place}")
        _refuse_doubled(row, f"{path}, {place}")
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise DataError(f"{path}, {place} is not a JSON object: {line.strip()[:60]!r}")
        yield Record(place, cast("Mapping[str, object]", row))


def _listed(name: str, rows: list[object], digest: str) -> Table:
    columns: dict[str, None] = {}
    for record in _listed_records(name, rows):
        columns.update(dict.fromkeys(record.values))
    return Table(
        name=name,
        columns=tuple(columns),
        records=partial(_listed_records, name, rows),
        digest=digest,
    )


def _listed_records(name: str, rows: list[object]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        place = f"row {number}"
        _refuse_doubled(row, f"{name}, {place}")
        if isinstance(row, dict):
            yield Record(place, cast("Mapping[str, object]", row))
        elif isinstance(row, str):
            yield Record(place, {"text": row})
        elif isinstance(row, list) and len(row) == 2:
            yield Record(place, dict(zip(("text", "label"), row, strict=True)))
        else:
            raise DataError(
                f"{name}, {place} must be a text, an object or [text, label] (got {row!r:.60})"
            )


def _parquet_records(path: Path) -> Iterator[Record]:
    number = 0
    with _parquet_errors(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"row {number}", row)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        with readable(path):
            yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text is not UTF-8 ({error})") from error
    except (pa.ArrowException, ValueError) as error:  # ValueError: an unknown feature of datasets
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
