"""Rows without text and bad rows: counted while rows are read, and told at every start."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megakd.data.bad_rows import BadRows
from megakd.errors import DataError

if TYPE_CHECKING:
    from megakd.data.tables import Record

logger = logging.getLogger(__name__)
FILE = "blank_rows.json"
"""File in a folder of rows: the number of rows without text, the first, and the bad rows."""


@dataclass
class BlankRows:
    """Rows of a split with an empty text: their number, and the place of the first.

    bad: the rows that cannot be read.
    """

    count: int = 0
    first: str = ""
    bad: BadRows = field(default_factory=BadRows)

    def add(self, record: Record) -> None:
        """Count one more row."""
        self.first = self.first or record.place
        self.count += 1

    def write(self, folder: Path) -> None:
        """Write the numbers beside the rows.

        Raises:
            DataError: there are bad rows, which are not left out.
        """
        self.bad.finish()
        record = {"count": self.count, "first": self.first, "bad": self.bad.count}
        (folder / FILE).write_text(json.dumps(record), encoding="utf-8")

    @staticmethod
    def tell(folder: Path, name: str, *, rows: int, are_kept: bool) -> None:
        """Log a warning for the rows that `write` has counted.

        Args:
            folder: the folder of the rows.
            name: name of the rows in messages.
            rows: number of rows that are used.
            are_kept: whether rows without text are used.

        Raises:
            DataError: all kept rows have no text.
        """
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
