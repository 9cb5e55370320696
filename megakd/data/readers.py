"""Rows of files, one at a time: csv, tsv, jsonl, json, txt and parquet, also compressed (gz, zst).

The standard library parses texts. The readers of `datasets` fill up short rows of a csv file, move
the columns of a file whose rows all have a field too many, and change numbers of JSON, without an
error. A text file that is not UTF-8 is refused with the number of the line. A csv file may have
quoted fields (RFC 4180). A tsv file has no quoting: `"` is a character of the text, as in GLUE's
files. A txt file is read in pieces of whole paragraphs with about 8000 characters. A piece is
longer than most contexts, and small enough that a held-out split can be cut from a single book.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, IterableDataset, LargeList, List, Value

from megakd.config.paths import DATA_SUFFIXES, data_suffix
from megakd.data.arrow import key_of, remembered_of
from megakd.data.records import Record, Table
from megakd.errors import DataError
from megakd.process.files import sha256_of

BOM = b"\xef\xbb\xbf"
ROWS_PER_READ = 1000
FIRST_LINES = 20
HEAD_ROWS = 1000
"""Rows that tell the columns of a file that is not read whole before training."""
SAMPLED_BYTES = 1 << 16
QUOTED_AFTER_BLANK = re.compile(r'(^|,) +"[^"]*"\s*(,|$)', re.MULTILINE)
"""A field of a csv file whose writer puts a blank behind each comma: the quotes are no text."""
FORMS = {
    rb"(?s).?\0": "text is UTF-16 or UTF-32; convert the file to UTF-8",
    rb"[^\n]*\r[^\n]+\Z": "lines end with CR (\\r) alone; save the file with LF as line end",
    rb'(?i)"?sep=."?\r?\n': "sep= is a line for Excel alone; remove it, and separate the fields by "
    "commas (by tabs in a file that is named .tsv)",
}
"""First lines of files that are not read, and what to change."""
# Values of any kind, stored as JSON text; the first versions of `datasets` 4 do not have it.
JSON_FEATURE = getattr(datasets, "Json", Value)
PIECE_CHARACTERS = 8000
# A file whose held-out split is cut from its own text is cut into about this many pieces or more.
FEWEST_PIECES = 40
Read = Record | DataError
"""A row, or why it cannot be read."""


def files_table(
    paths: Sequence[Path],
    key: str,
    *,
    name: str | None = None,
    to_be_split: bool = False,
    is_streamed: bool = False,
) -> Table:
    """Return the concatenated rows of files, which messages call `name`, or else by the setting.

    Small txt files from which a held-out split will be cut (`to_be_split`) need shorter pieces. Of
    files that are streamed, the first rows tell the columns, and the digest is of their beginnings
    and ends.
    """
    suffixes = [data_suffix(path) for path in paths]
    formats = [suffix.replace("ndjson", "jsonl") for suffix in suffixes]
    for path, form in zip(paths, formats, strict=True):
        if form not in DATA_SUFFIXES:
            raise DataError(
                f"{key}: {path} has an unsupported ending; supported: {', '.join(DATA_SUFFIXES)}, "
                "also compressed (.gz, .bz2, .zst)"
            )
        if is_streamed and form == ".json":
            raise DataError(
                f"{key}: {path} is a json file, which can only be read whole, and task.streaming "
                "is true; write one object per line and name the file .jsonl"
            )
        # "True" of a csv file is a word, and true of a jsonl file is none.
        if form != formats[0] and not is_streamed:
            raise DataError(
                f"{key}: {path} and {paths[0]} have different formats; give all files of a split "
                "in one format"
            )
    with readable(paths[0]):
        size = sum(path.stat().st_size for path in paths)
    piece = min(PIECE_CHARACTERS, size // FEWEST_PIECES) if to_be_split else PIECE_CHARACTERS
    columns: dict[str, None] = {}
    first = paths[0]
    for path in paths:
        of_file = _columns(path, HEAD_ROWS if is_streamed else None)
        if columns and of_file and not is_streamed and {*of_file} != {*columns}:
            raise DataError(
                f"{path} has the columns {', '.join(of_file)}, but {first} has "
                f"{', '.join(columns)}; all files need the same columns"
            )
        first = first if columns else path
        columns |= dict.fromkeys(of_file)

    def records() -> Iterator[Read]:
        for path in paths:
            for record in records_of(path, piece=piece):
                if len(paths) == 1 or isinstance(record, DataError):
                    yield record
                else:
                    yield Record(f"{path.name} {record.place}", record.values)

    def digest(path: Path) -> str:
        with readable(path):
            return content_hash(path)

    return Table(
        name=str(paths[0]) if len(paths) == 1 else name or key,
        columns=tuple(columns),
        records=records,
        digest=key_of(
            [*map(sample_of if is_streamed else digest, paths)],
            suffixes,
            piece if ".txt" in suffixes else 0,
        ),
        class_names=class_names_of(_features(first)) if suffixes[0] == ".parquet" else {},
    )


def content_hash(path: Path) -> str:
    """Return the sha256 of a file, which is read once for its size, time and place on the disk."""
    return remembered_of(path, lambda: sha256_of(path), "sha256")


def records_of(path: Path, *, piece: int = PIECE_CHARACTERS) -> Iterator[Read]:
    """Return the rows of a file, and the error of a row in its place."""
    suffix = data_suffix(path)
    if suffix == ".txt":
        texts = pieces(_text_lines(path), piece)
        return (Record(f"line {number}", {"text": text}) for number, text in texts)
    if suffix == ".parquet":
        return _parquet_records(path)
    if suffix == ".json":
        return _json_records(path)
    return _delimited_records(path) if suffix in (".csv", ".tsv") else _jsonl_records(path)


def _delimited_records(path: Path) -> Iterator[Read]:
    rows = _fields(path)
    _, columns = next(rows, (0, []))
    for number, values in rows:
        if len(values) == len(columns):
            yield Record(f"line {number}", dict(zip(columns, values, strict=True)))
        else:
            yield DataError(
                f"{path}, line {number}: {len(values)} fields, but there are {len(columns)} "
                f"columns ({', '.join(columns)})"
            )


def _jsonl_records(path: Path) -> Iterator[Read]:
    for number, line in enumerate(_text_lines(path), start=1):
        if line.strip():
            yield _json_record(line, f"line {number}", path)


def _json_records(path: Path) -> Iterator[Read]:
    rows = parse_json("".join(_text_lines(path)), str(path))
    if not isinstance(rows, list):
        raise DataError(
            f"{path} is not a JSON list of rows; use the ending .jsonl for a file with one object "
            "per line, and a file for each split"
        )
    for number, row in enumerate(cast("list[object]", rows), start=1):
        place = f"row {number}"
        if isinstance(row, dict):
            yield Record(place, cast("Mapping[str, object]", row))
        elif isinstance(row, str):
            yield Record(place, {"text": row})
        elif isinstance(row, list) and len(row) == 2:
            yield Record(place, dict(zip(("text", "label"), row, strict=True)))
        else:
            yield DataError(
                f"{path}, {place} must be a text, an object or [text, label] (got {row!r:.60})"
            )


def _columns(path: Path, most: int | None) -> Sequence[str]:
    suffix = data_suffix(path)
    if suffix in (".jsonl", ".ndjson", ".json"):
        with readable(path):
            return remembered_of(path, lambda: _keys(records_of(path), most), "columns", most)
    if suffix == ".txt":
        first = next(_text_lines(path), "")
        if first.startswith("{") and isinstance(_json_record(first, "", path), Record):
            raise DataError(f"{path}, line 1: a row of JSON; name a file with such rows .jsonl")
        return ("text",)
    if suffix == ".parquet":
        with _parquet_errors(path):
            columns = pq.read_schema(path).names
    else:
        columns = next(_fields(path), (0, []))[1]
    if doubled := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(
            f"{path}: column {doubled[0]!r} occurs more than once; rename or remove one of the "
            "columns"
        )
    if suffix == ".csv" and len(columns) == 1 and (separators := {*columns[0]} & {*";\t|"}):
        raise DataError(
            f"{path}, line 1: no comma, but {min(separators)!r} in {columns[0]!r}; separate "
            "the fields by commas (by tabs in a file that is named .tsv), or rename the column"
        )
    return columns


def _keys(records: Iterator[Read], most: int | None) -> list[str]:
    columns: dict[str, None] = {}
    error: DataError | None = None
    for record in islice(records, most):
        if isinstance(record, DataError):
            error = error or record
        else:
            columns |= dict.fromkeys(record.values)
    if error and not columns:
        raise error
    return [*columns]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Convert system errors about a file into a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _text_lines(path: Path) -> Iterator[str]:
    # Lines with their ends, without a byte order mark.
    with readable(path), pa.input_stream(str(path), compression="detect") as stream:
        for number, line in enumerate(io.BufferedReader(cast("Any", stream)), start=1):
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


def _fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line and the fields of every row that is not empty."""
    lines = _text_lines(path)
    if data_suffix(path) == ".tsv":
        rows = ((n, line.rstrip("\r\n")) for n, line in enumerate(lines, start=1))
        yield from ((number, row.split("\t")) for number, row in rows if row)
        return
    csv.field_size_limit(sys.maxsize)  # fields of 131072 characters by default
    head = [*islice(lines, FIRST_LINES)]
    skips = bool(QUOTED_AFTER_BLANK.search("".join(head)))
    reader = csv.reader(chain(head, lines), strict=True, skipinitialspace=skips)
    number = 1
    try:
        for values in reader:
            if values:
                yield number, values
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {number}: not valid CSV: {error}") from error


def _json_record(line: str, place: str, path: Path) -> Read:
    is_list = line.lstrip().startswith("[")
    try:
        row = None if is_list else parse_json(line, f"{path}, {place}")
    except DataError as error:
        return error
    if isinstance(row, str):
        return Record(place, {"text": row})
    if isinstance(row, dict):
        return Record(place, cast("dict[str, object]", row))
    hint = "; a file that is one list of rows is named .json" if is_list else ""
    return DataError(f"{path}, {place} is not a JSON object: {line.strip()[:60]!r}{hint}")


def parse_json(text: str, place: str) -> object:
    """Return the content of a JSON text, whose objects have every key once."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        lines = "Extra data" in str(error) and place.lower().endswith(".json")
        hint = "; a file with a row in each line is named .jsonl" if lines else ""
        raise DataError(f"{place} is not JSON: {error}{hint}") from error


def _json_object(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {doubled!r} occurs more than once; keep one of its values")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_json_object)


# Rows with types, of parquet files and of the Hub


def typed_table(name: str, rows: Dataset | IterableDataset, *, digest: str) -> Table:
    """Return a split of `datasets` as a table of its plain columns."""
    if rows.features is None:  # a stream whose first rows decide
        features: Mapping[str, object] = dict.fromkeys(next(iter(rows), {}))
    else:
        features = plain_features(rows.features)
        rows = rows.select_columns([*features])

    def records() -> Iterator[Read]:
        batches = cast("Iterator[dict[str, list[object]]]", rows.iter(ROWS_PER_READ))
        return _typed_records(batches, features)

    return Table(
        name=name,
        columns=tuple(features),
        records=records,
        digest=key_of(digest, class_names := class_names_of(features)),  # the values are numbers
        class_names=class_names,
    )


def _typed_records(
    batches: Iterable[dict[str, list[object]]], features: Mapping[str, object]
) -> Iterator[Read]:
    rows = (zip(c, v, strict=True) for c in batches for v in zip(*c.values(), strict=True))
    for number, row in enumerate(rows, start=1):
        yield Record(f"row {number}", {name: untyped(v, features[name]) for name, v in row})


def untyped(value: object, feature: object) -> object:
    """Return a value as it is in jsonl: classes by name, and objects without added nulls.

    Typed objects have nulls for missing keys. JSON, which has no types, keeps its nulls.
    """
    if isinstance(feature, ClassLabel) and isinstance(value, int):
        if value == -1:  # `datasets` writes it for a row without a class
            return None
        return feature.names[value] if 0 <= value < len(feature.names) else value
    if isinstance(feature, List | LargeList) and isinstance(value, list):
        if isinstance(feature.feature, Value):
            return cast("object", value)
        return [untyped(v, feature.feature) for v in cast("list[object]", value)]
    if isinstance(feature, dict) and isinstance(value, dict):
        features = cast("dict[str, object]", feature)
        items = cast("dict[str, object]", value).items()
        return {k: untyped(v, features.get(k)) for k, v in items if v is not None}
    return value


def plain_features(features: Mapping[str, object]) -> Features:
    """Return the columns of texts, numbers, classes and JSON, and lists or objects of them."""
    return Features({name: kind for name, kind in features.items() if _is_plain(kind)})


def _is_plain(feature: object) -> bool:
    if isinstance(feature, List | LargeList):
        return _is_plain(feature.feature)
    if isinstance(feature, dict):
        return all(map(_is_plain, cast("dict[str, object]", feature).values()))
    return isinstance(feature, Value | ClassLabel | JSON_FEATURE)


def class_names_of(features: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Return the class names by column, for columns of classes or of lists of classes."""
    columns = {n: f.feature if isinstance(f, List) else f for n, f in features.items()}
    return {
        name: tuple(feature.names)
        for name, feature in columns.items()
        if isinstance(feature, ClassLabel) and feature.names
    }


def _features(path: Path) -> Features:
    known: list[pa.Field] = []
    with _parquet_errors(path):
        schema = pq.read_schema(path)
        for column in schema:
            is_coded = pa.types.is_dictionary(column.type)  # a Categorical of pandas or polars
            field = column.with_type(column.type.value_type) if is_coded else column
            with suppress(ValueError):  # a type unknown to `datasets`: the column has no values
                Features.from_arrow_schema(pa.schema([field]))
                known.append(field)
        return plain_features(
            Features.from_arrow_schema(pa.schema(known, metadata=schema.metadata))
        )


def _parquet_records(path: Path) -> Iterator[Read]:
    features = _features(path)
    with _parquet_errors(path), pq.ParquetFile(path) as file:
        batches = file.iter_batches(ROWS_PER_READ, columns=[*features])
        decoded = (cast("Any", features).decode_batch(batch.to_pydict()) for batch in batches)
        yield from _typed_records(decoded, features)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        with readable(path):
            yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text is not UTF-8 ({error})") from error
    except (pa.ArrowException, ValueError, OverflowError) as error:  # or a date beyond Python's
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


# Digests, and the pieces of txt files


def sample_of(path: Path) -> str:
    """Return a hash of the name, the size, the first and the last 64 KiB of a file."""
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        digest = hashlib.sha256(f"{path.name}:{size}:".encode())
        for start in (0, max(0, size - SAMPLED_BYTES)):
            file.seek(start)
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def pieces(lines: Iterable[str], length: int) -> Iterator[tuple[int, str]]:
    """Yield number of the first line and text of pieces of at least `length` characters.

    A piece ends at the first blank line after `length` characters, or at the first end of a line
    after twice as many characters.
    """
    piece: list[str] = []
    characters, first = 0, 1
    for number, line in enumerate(chain(lines, [None]), start=1):
        if line is not None:
            piece.append(line)
            characters += len(line)
            if characters < (2 * length if line.strip() else length):
                continue
        text = "".join(piece).strip("\r\n")
        if text.strip():
            yield first, text
        piece, characters, first = [], 0, number + 1
