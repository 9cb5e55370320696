"""Rows that cannot be used: counted, and left out or named in one error."""

from __future__ import annotations

import logging
from typing import Literal

from megakd.errors import DataError

logger = logging.getLogger(__name__)
MOST_NAMED = 20


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
