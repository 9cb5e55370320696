"""Raw tables of a split: named columns that can be read row by row, several times.

Rows that cannot be used are counted, and left out or named in one error; see `BadRows`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megakd.errors import DataError

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

    records: function that reads all rows from the beginning, with constant memory.
    digest: sha256 of the source of the rows.
    format: what the rows depend on beside the content: `tsv`, and `blanks` of a csv file whose
        quotes follow a blank; else empty.
    class_names: class names by column, if the data itself declares class names.
    """

    name: str
    columns: tuple[str, ...]
    records: Callable[[], Iterator[Record]]
    digest: str
    format: str = ""
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def require(table: Table, column: str, key: str) -> None:
    """Raise a DataError that names `key` if a table does not have a column."""
    if column not in table.columns:
        raise DataError(
            f"{table.name}: column {column!r} ({key}) does not exist; the columns are "
            f"{', '.join(table.columns)}"
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


class BadRows:
    """A context that keeps the `DataError` of a row, so that the next rows are read too.

    Args:
        choice: `task.bad_rows`.
        named: the number of errors to raise together, the last of them at once; or to log.
    """

    def __init__(
        self, choice: Literal["error", "drop"] = "error", *, named: int = MOST_NAMED
    ) -> None:
        self._drops, self._named = choice == "drop", named
        self.count, self.errors = 0, list[str]()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, DataError):
            return False
        self.count += 1
        if self._drops and self.count <= self._named:
            logger.warning("a row is left out (task.bad_rows: drop): %s", error)
        elif not self._drops:
            self.errors.append(str(error))
            if self.count == self._named:
                self.finish()
        return True

    def finish(self) -> None:
        """Raise the kept errors as one, unless the rows are left out."""
        if self.count == 1 and self.errors:
            raise DataError(self.errors[0])
        if self.errors:
            raise DataError(
                f"{'the first ' if self.count == self._named else ''}{self.count} rows that cannot "
                "be used (correct them, or set task.bad_rows: drop to leave them out):\n  "
                + "\n  ".join(self.errors)
            )
