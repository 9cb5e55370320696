"""Tables of records as they are read from files, and the rows that cannot be used."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megakd.config.paths import without_compression
from megakd.errors import DataError, listed

logger = logging.getLogger(__name__)

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
