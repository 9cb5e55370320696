"""Rows that cannot be used: named together in one error, or left out and counted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from megakd.errors import DataError

if TYPE_CHECKING:
    from types import TracebackType

logger = logging.getLogger(__name__)
MOST_NAMED = 20


class BadRows:
    """A context that keeps the `DataError` of a row, so that the next rows are read too.

    Args:
        choice: `task.bad_rows`: drop logs the error, and error raises it with those of other rows.
        named: the number of errors to raise together; the last of them is raised at once.
    """

    def __init__(
        self, choice: Literal["error", "drop"] = "error", *, named: int = MOST_NAMED
    ) -> None:
        self._choice, self._named = choice, named
        self.count = 0
        self.first: list[str] = []
        """The messages of the first rows."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        if not isinstance(error, DataError):
            return False
        self.add(1, [str(error)])
        return True

    def add(self, count: int, messages: list[str]) -> None:
        """Count further bad rows, with the messages of the first of them."""
        self.count += count
        new = messages[: self._named - len(self.first)]
        self.first += new
        if self._choice == "error":
            if len(self.first) == self._named:
                self.finish()
            return
        for message in new:
            logger.warning("a row is left out (task.bad_rows: drop): %s", message)

    def finish(self) -> None:
        """Raise the kept errors as one, unless the rows are left out.

        Raises:
            DataError: rows cannot be used.
        """
        if self._choice == "drop" or not self.first:
            return
        if len(self.first) == 1:
            raise DataError(self.first[0])
        so_many = "the first " if len(self.first) == self._named else ""
        lines = "".join(f"\n  {message}" for message in self.first)
        raise DataError(
            f"{so_many}{len(self.first)} rows that cannot be used (correct them, or set "
            f"task.bad_rows: drop to leave them out):{lines}"
        )
