"""Rows without text and rows that cannot be used: counted, and left out or named in one error."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megakd.data.tables import Record
from megakd.errors import DataError

logger = logging.getLogger(__name__)
MOST_NAMED = 20
FILE = "blank_rows.json"
"""File in a folder of rows: the number of rows without text, the first, and the bad rows."""


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


@dataclass
class BlankRows:
    """Rows of a split with an empty text: their number, and the place of the first."""

    count: int = 0
    first: str = ""
    bad: BadRows = field(default_factory=BadRows)

    def add(self, record: Record) -> None:
        self.first = self.first or record.place
        self.count += 1

    def write(self, folder: Path) -> None:
        """Write the numbers beside the rows."""
        self.bad.finish()
        record = {"count": self.count, "first": self.first, "bad": self.bad.count}
        (folder / FILE).write_text(json.dumps(record), encoding="utf-8")

    @staticmethod
    def tell(folder: Path, name: str, *, rows: int, are_kept: bool) -> None:
        """Log a warning for the rows that `write` has counted."""
        there = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if there.get("bad"):
            logger.warning("%s: %d bad row(s) left out (task.bad_rows: drop)", name, there["bad"])
        if there["count"]:
            if are_kept and there["count"] == rows:
                raise DataError(
                    f"{name}: all {rows} rows have an empty text; check task.text_columns"
                )
            logger.warning(
                "%s: %d row(s) with an empty text, the first is %s; such rows are %s",
                *(name, there["count"], there["first"]),
                "used as they are" if are_kept else "left out",
            )
