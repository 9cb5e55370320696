"""Strict, streaming readers of local files: csv, tsv, jsonl, json, parquet and txt.

A text file that is not UTF-8 is refused with the number of the line. A csv file may have quoted
fields (RFC 4180). A tsv file has no quoting: `"` is a character of the text, as in GLUE's files.
A txt file is read in pieces of whole paragraphs with about 8000 characters. A piece is longer than
most contexts, and small enough that a held-out split can be cut from a single book.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, LargeList, List, Value
from datasets.features.features import decode_nested_example, require_decoding

from megakd.data.arrow import SPLIT_ALIASES, Record, SplitName, Table, remembered_of
from megakd.errors import DataError
from megakd.storage.atomic import sha256_of

BOM = b"\xef\xbb\xbf"
PARQUET_BATCH_ROWS = 1000
QUOTED_AFTER_BLANK = re.compile(r'(^|,) +"[^"]*"\s*(,|$)', re.MULTILINE)
"""A field of a csv file whose writer puts a blank behind each comma: the quotes are no text."""
FIRST_LINES = 20
FORMS = {
    rb"(?s).?\0": "text is UTF-16 or UTF-32; convert the file to UTF-8",
    rb"[^\n]*\r[^\n]+\Z": "lines end with CR (\\r) alone; save the file with LF as line end",
    rb'(?i)"?sep=."?\r?\n': "sep= is a line for Excel alone; remove it, and separate the fields by "
    "commas (by tabs in a file that is named .tsv)",
}
"""First lines of files that are not read, and what to change."""
# Values of any kind, stored as JSON text; the first versions of `datasets` 4 do not have it.
JSON_FEATURE = getattr(datasets, "Json", Value)


Digest = Callable[[Path], str]
"""A function that returns a hash of a file."""
PIECE_CHARACTERS = 8000
# A file whose held-out split is cut from its own text is cut into about this many pieces or more.
FEWEST_PIECES = 40


def _digest_of(path: Path) -> str:
    with readable(path):
        return remembered_of(path, lambda: sha256_of(path), "sha256")


def read_csv(path: Path, *, digest: Digest = _digest_of) -> Table:
    """Read a csv file with a header; fields may be quoted and contain line breaks."""
    skips = bool(QUOTED_AFTER_BLANK.search("".join(islice(_text_lines(path), FIRST_LINES))))
    table = _with_header(path, partial(_csv_fields, skips_blanks=skips), digest=digest)
    if len(table.columns) == 1 and (separators := {*table.columns[0]} & {*";\t|"}):
        raise DataError(
            f"{path}, line 1: no comma, but {min(separators)!r} in {table.columns[0]!r}; separate "
            "the fields by commas (by tabs in a file that is named .tsv), or rename the column"
        )
    return replace(table, format="blanks" if skips else "")


def read_tsv(path: Path, *, digest: Digest = _digest_of) -> Table:
    """Read a tsv file without quoting."""
    return replace(_with_header(path, _tsv_fields, digest=digest), format="tsv")


def by_split(names: Iterable[str], place: str) -> dict[SplitName, str]:
    """Return the name of every split among names; names that mean no split are left out."""
    chosen: dict[SplitName, str] = {}
    for name in names:
        split = SPLIT_ALIASES.get(name.lower())
        if split is None:
            continue
        if split in chosen:
            raise DataError(
                f"{place}: {chosen[split]!r} and {name!r} are names of the same split ({split}); "
                f"keep one of them, or put the rows to use into a file and set task.{split}_files"
            )
        chosen[split] = name
    return chosen


def read_parquet(path: Path, *, digest: Digest = _digest_of) -> Table:
    """Read a parquet file, and the class names that `datasets` may have stored in its schema.

    A row has no value in columns that are not plain, or of types unknown to `datasets`.
    """
    known: list[pa.Field] = []
    with _parquet_errors(path):
        schema = pq.read_schema(path)
        _refuse_doubled_columns(path, schema.names)
        for field in schema:
            with suppress(ValueError):
                Features.from_arrow_schema(pa.schema([field]))
                known.append(field)
        features = Features.from_arrow_schema(pa.schema(known, metadata=schema.metadata))
    features = {name: kind for name, kind in features.items() if is_plain(kind)}
    # Of the plain features, only JSON is stored in another form.
    coded = {n: kind for n, kind in features.items() if require_decoding(kind)}
    return Table(
        name=str(path),
        columns=tuple(schema.names),
        records=partial(_parquet_records, path, coded, features),
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


def columns_without_added_nulls(
    row: Mapping[str, object], features: Mapping[str, object]
) -> dict[str, object]:
    """Return a row of typed columns without the nulls that typed objects have for missing keys.

    JSON, which has no types, keeps its nulls.
    """
    return {name: _without_added_nulls(value, features.get(name)) for name, value in row.items()}


def _without_added_nulls(value: object, feature: object) -> object:
    if isinstance(feature, List | LargeList) and isinstance(value, list):
        if isinstance(feature.feature, Value):
            return cast("object", value)
        return [_without_added_nulls(v, feature.feature) for v in cast("list[object]", value)]
    if isinstance(feature, dict) and isinstance(value, dict):
        features = cast("dict[str, object]", feature)
        items = cast("dict[str, object]", value).items()
        return {k: _without_added_nulls(v, features.get(k)) for k, v in items if v is not None}
    return value


def joined(tables: Sequence[Table], name: str) -> Table:
    """Return the concatenation of tables, such as the shards of one split."""
    if len(tables) == 1:
        return tables[0]
    digest = ":".join(table.digest for table in tables)
    tables = [table for table in tables if table.columns] or tables  # an empty shard has none
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
        digest=digest,
        format=first.format,
        class_names=first.class_names,
    )


def _numberings(table: Table, first: Table) -> dict[str, tuple[int, ...]]:
    numberings: dict[str, tuple[int, ...]] = {}
    for column in sorted({*first.class_names, *table.class_names}):
        expected, given = (part.class_names.get(column, ()) for part in (first, table))
        if sorted(given) != sorted(expected):
            here, there = (
                f"the class names {', '.join(names)}" if names else "no class names"
                for names in (given, expected)
            )
            raise DataError(
                f"{table.name}: column {column!r} has {here}, but in {first.name} it has {there}; "
                "write all files with the same class names"
            )
        if given != expected:
            numberings[column] = tuple(map(expected.index, given))
    return numberings


def _renumbered(
    values: Mapping[str, object], numberings: Mapping[str, tuple[int, ...]]
) -> dict[str, object]:
    # Other numbers stay (-1: no class).
    changed = dict(values)
    for column, numbers in numberings.items():
        value = values.get(column)
        if isinstance(value, int) and 0 <= value < len(numbers):
            changed[column] = numbers[value]
    return changed


def class_names_of(features: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
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


def _text_lines(path: Path, each: Callable[[bytes], None] | None = None) -> Iterator[str]:
    # Lines with their ends, without a byte order mark.
    with readable(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if each is not None:
                each(line)
            raw = line.removeprefix(BOM) if number == 1 else line
            for text in (FORMS[form] for form in FORMS if number == 1 and re.match(form, raw)):
                raise DataError(f"{path}, line 1: {text}")
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: text is not UTF-8 (byte 0x{raw[error.start]:02x} at "
                    f"position {error.start}); convert the file to UTF-8"
                ) from error


def _refuse_doubled_columns(path: Path, columns: Sequence[str]) -> None:
    doubled = sorted({name for name in columns if columns.count(name) > 1})
    if doubled:
        raise DataError(
            f"{path}: column {doubled[0]!r} occurs more than once; rename or remove one of the "
            "columns"
        )


def _with_header(
    path: Path,
    fields_of: Callable[[Path], Iterator[tuple[int, list[str]]]],
    *,
    digest: Digest,
) -> Table:
    columns = tuple(next(fields_of(path), (0, []))[1])
    _refuse_doubled_columns(path, columns)

    def records() -> Iterator[Record]:
        rows = fields_of(path)
        next(rows, None)
        for number, values in rows:
            if len(values) != len(columns):
                raise DataError(
                    f"{path}, line {number}: {len(values)} fields, but there are {len(columns)} "
                    f"columns ({', '.join(columns)})"
                )
            yield Record(f"line {number}", dict(zip(columns, values, strict=True)))

    return Table(name=str(path), columns=columns, records=records, digest=digest(path))


def _csv_fields(path: Path, *, skips_blanks: bool) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_text_lines(path), strict=True, skipinitialspace=skips_blanks)
    first_line = 1
    while True:
        # `csv` refuses fields of more than 131072 characters by default; documents may be longer.
        # The limit is that of the process, in which other files are read by turns.
        limit = csv.field_size_limit(sys.maxsize)
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {first_line}: not valid CSV: {error}") from error
        finally:
            csv.field_size_limit(limit)
        if values is None:
            return
        if values:
            yield first_line, values
        first_line = reader.line_num + 1


def _tsv_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(_text_lines(path), start=1):
        if content := line.rstrip("\r\n"):
            yield number, content.split("\t")


def _parquet_records(
    path: Path, coded: Mapping[str, object], features: Mapping[str, object]
) -> Iterator[Record]:
    number = 0
    with _parquet_errors(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[*features]):
            for row in batch.to_pylist():
                number += 1
                decoded = {n: decode_nested_example(kind, row[n]) for n, kind in coded.items()}
                yield Record(f"row {number}", columns_without_added_nulls(row | decoded, features))


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        with readable(path):
            yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text is not UTF-8 ({error})") from error
    except (pa.ArrowException, ValueError, OverflowError) as error:  # or a date beyond Python's
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def read_jsonl(path: Path, *, digest: Digest | None = None) -> Table:
    """Read a file with one JSON object (or one string) per line.

    A large file has a `digest` of its own, and the keys of its first row with keys as columns.
    """
    read = partial(_jsonl_records, path)
    if digest is None:
        with readable(path):
            content, columns = remembered_of(path, lambda: _scanned(path), "jsonl")
    else:
        with_keys = (record for record in read() if record.values)
        content, columns = digest(path), _columns_of(islice(with_keys, 1))
    if not columns:
        for record in read():
            record.values.get("text")  # no line can be read: raise why
    return Table(name=str(path), columns=tuple(columns), records=read, digest=content)


def _scanned(path: Path) -> tuple[str, list[str]]:
    content = hashlib.sha256()
    columns = _columns_of(_jsonl_records(path, content.update))
    return content.hexdigest(), columns


def _columns_of(records: Iterable[Record]) -> list[str]:
    return list({name: None for record in records for name in record.values})


def read_json(path: Path) -> dict[SplitName, Table]:
    """Read a JSON list of strings, objects or [text, label], or a mapping from splits to lists."""
    tree = parse_json("".join(_text_lines(path)), str(path))
    _refuse_doubled(tree, str(path))
    digest = _digest_of(path)
    if isinstance(tree, list):
        return {"train": _listed(str(path), cast("object", tree), digest)}
    if isinstance(tree, dict):
        named = cast("dict[str, object]", tree)
        if splits := by_split(named, str(path)):
            return {
                split: _listed(f"{path} ({name})", named[name], f"{digest}:{name}")
                for split, name in splits.items()
            }
    raise DataError(
        f"{path} is neither a JSON list of rows nor an object with a list named 'train'; use the "
        "ending .jsonl for a file with one object per line"
    )


class Unreadable(dict[str, object]):
    """The values of a line that cannot be read: asking for one raises the error of the line."""

    def __init__(self, error: DataError) -> None:
        super().__init__()
        self._error = error

    def get(self, *_: object) -> NoReturn:
        raise self._error


class DoubledKeys(dict[str, object]):
    """A JSON object with a repeated key."""

    def __init__(self, pairs: Sequence[tuple[str, object]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.key = next(name for name in names if names.count(name) > 1)


def parse_json(text: str, place: str) -> object:
    """Return the content of a JSON text; objects that repeat a key become `DoubledKeys`."""
    try:
        return json.loads(text, object_pairs_hook=_json_object)
    except (ValueError, RecursionError) as error:
        lines = "Extra data" in str(error) and place.lower().endswith(".json")
        hint = "; a file with a row in each line is named .jsonl" if lines else ""
        raise DataError(f"{place} is not JSON: {error}{hint}") from error


def _json_object(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else DoubledKeys(pairs)


def _refuse_doubled(tree: object, place: str) -> None:
    if isinstance(tree, DoubledKeys):
        raise DataError(
            f"{place}: the key {tree.key!r} occurs more than once; keep one of its values"
        )


def _refuse_doubled_within(tree: object, place: str) -> None:
    # Without recursion, because a tree may be as deep as Python can read.
    left = [tree]
    while left:
        part = left.pop()
        _refuse_doubled(part, place)
        if isinstance(part, dict):
            left += cast("dict[str, object]", part).values()
        elif isinstance(part, list):
            left += cast("list[object]", part)


def _jsonl_records(path: Path, each: Callable[[bytes], None] | None = None) -> Iterator[Record]:
    for number, line in enumerate(_text_lines(path, each), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            yield Record(place, _values(line, f"{path}, {place}"))
        except DataError as error:
            yield Record(place, Unreadable(error))


def _values(line: str, place: str) -> Mapping[str, object]:
    is_list = line.lstrip().startswith("[")
    row = None if is_list else parse_json(line, place)
    _refuse_doubled_within(row, place)
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        hint = "; a file that is one list of rows is named .json" if is_list else ""
        raise DataError(f"{place} is not a JSON object: {line.strip()[:60]!r}{hint}")
    return cast("Mapping[str, object]", row)


def _listed(name: str, rows: object, digest: str) -> Table:
    if not isinstance(rows, list):
        raise DataError(
            f"{name} is not a list of rows (got {rows!r:.60}); write a list, or remove the key"
        )
    listed = cast("list[object]", rows)
    return Table(
        name=name,
        columns=tuple(_columns_of(_listed_records(name, listed))),
        records=partial(_listed_records, name, listed),
        digest=digest,
    )


def _listed_records(name: str, rows: list[object]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        place = f"row {number}"
        _refuse_doubled_within(row, f"{name}, {place}")
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


def read_documents(paths: Sequence[Path], name: str, *, to_be_split: bool) -> Table:
    """Return the texts of files as rows of a table.

    Small files from which a held-out split will be cut (`to_be_split`) need shorter pieces.
    """
    size = 0
    for path in paths:
        with readable(path):
            size += path.stat().st_size
    length = min(PIECE_CHARACTERS, size // FEWEST_PIECES) if to_be_split else PIECE_CHARACTERS
    return Table(
        name=name,
        columns=("text",),
        records=partial(documents_of, paths, length),
        digest=":".join([*(_digest_of(path) for path in paths), str(length)]),
    )


def documents_of(paths: Sequence[Path], length: int = PIECE_CHARACTERS) -> Iterator[Record]:
    """Yield the pieces of files, see `pieces`."""
    for path in paths:
        for number, piece in pieces(_text_lines(path), length):
            yield Record(f"{path.name} line {number}", {"text": piece})


def pieces(lines: Iterator[str], length: int) -> Iterator[tuple[int, str]]:
    """Yield number of the first line and text of pieces of at least `length` characters.

    A piece ends at the first blank line after `length` characters, or at the first end of a line
    after twice as many characters.
    """
    held: list[str] = []
    characters, first = 0, 1
    for number, line in enumerate(lines, start=1):
        held.append(line)
        characters += len(line)
        ends_paragraph = not line.strip()
        if characters >= (length if ends_paragraph else 2 * length):
            yield from _piece(first, held)
            held, characters, first = [], 0, number + 1
    yield from _piece(first, held)


def _piece(first: int, lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    text = "".join(lines).strip("\r\n")
    if text.strip():
        yield first, text
