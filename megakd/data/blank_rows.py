"""Rows without text and bad rows: counted while rows are read, and told at every start."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megakd.errors import DataError

if TYPE_CHECKING:
    from megakd.data.bad_rows import BadRows
    from megakd.data.tables import Record

logger = logging.getLogger(__name__)
FILE = "blank_rows.json"
"""File in a folder of rows: the number of rows without text, and the place of the first."""


@dataclass
class BlankRows:
    """Rows of a split with an empty text: their number, and the place of the first.

    bad: number of rows that were left out because of `task.bad_rows: drop`.
    """

    count: int = 0
    first: str = ""
    bad: int = 0

    def add(self, record: Record) -> None:
        """Count one more row."""
        self.first = self.first or record.place
        self.count += 1

    def write(self, folder: Path, bad: BadRows) -> None:
        """Write the numbers beside the rows.

        Raises:
            DataError: there are bad rows, which are not left out.
        """
        bad.finish()
        self.bad = bad.count
        (folder / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> BlankRows:
        """Return the numbers that `write` wrote."""
        return BlankRows(**json.loads((folder / FILE).read_text(encoding="utf-8")))

    def tell(self, name: str, *, rows: int, are_kept: bool) -> None:
        """Log a warning for rows without text.

        Args:
            name: name of the rows in messages.
            rows: number of rows that are used.
            are_kept: whether rows without text are used.

        Raises:
            DataError: all kept rows have no text.
        """
        if self.bad:
            logger.warning("%s: %d bad row(s) are left out (task.bad_rows: drop)", name, self.bad)
        if not self.count:
            return
        if are_kept and self.count == rows:
            raise DataError(f"{name}: all {rows} rows have an empty text; check task.text_columns")
        logger.warning(
            "%s: %d row(s) with an empty text, the first is %s; such rows are %s",
            name,
            self.count,
            self.first,
            "used as they are" if are_kept else "left out",
        )
