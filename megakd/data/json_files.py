"""Strict readers of local JSON files: jsonl, with one object per line, and json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn, cast

from megakd.data.cache import remembered
from megakd.data.readers import Digest, by_split, digest_of, text_lines
from megakd.data.tables import Record, SplitName, Table
from megakd.errors import DataError


def read_jsonl(
    path: Path, *, digest: Digest = digest_of, rows_for_columns: int | None = None
) -> Table:
    """Read a file with one JSON object (or one string) per line.

    Args:
        path: the file.
        digest: function that returns the hash of the file.
        rows_for_columns: number of rows with keys from which the columns are taken; None: all rows.
    """
    content = digest(path)
    read = partial(_jsonl_records, path)
    if rows_for_columns is None:
        columns = remembered(lambda: _columns_of(read()), "columns", content)
    else:
        with_keys = (record for record in read() if record.values)
        columns = _columns_of(islice(with_keys, rows_for_columns))
    if not columns:
        for record in read():
            record.values.get("text")  # no line can be read: raise why
    return Table(name=str(path), columns=tuple(columns), records=read, digest=content)


def _columns_of(records: Iterable[Record]) -> list[str]:
    return list({name: None for record in records for name in record.values})


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


class Unreadable(dict[str, object]):
    """The values of a line that cannot be read: asking for one raises the error of the line."""

    def __init__(self, error: DataError) -> None:
        super().__init__()
        self._error = error

    def get(self, *_: object) -> NoReturn:
        """Raise the error."""
        raise self._error


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


def _jsonl_records(path: Path) -> Iterator[Record]:
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            yield Record(place, _values(line, f"{path}, {place}"))
        except DataError as error:
            yield Record(place, Unreadable(error))


def _values(line: str, place: str) -> Mapping[str, object]:
    row = parse_json(line, place)
    _refuse_doubled(row, place)
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise DataError(f"{place} is not a JSON object: {line.strip()[:60]!r}")
    return cast("Mapping[str, object]", row)


def _listed(name: str, rows: list[object], digest: str) -> Table:
    return Table(
        name=name,
        columns=tuple(_columns_of(_listed_records(name, rows))),
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
