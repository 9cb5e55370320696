"""The teacher that each training row names: read from a column, or given for all rows of a file."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megakd.contract.routes import ROUTE
from megakd.data.chat_rows import is_chat
from megakd.data.rows import PLACE
from megakd.data.tables import require
from megakd.errors import DataError, suggestion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from numpy.typing import NDArray

    from megakd.data.tables import Record, Table

logger = logging.getLogger(__name__)


class RowTeacher(NamedTuple):
    """Where the teacher of a row comes from: a column, or one name for all rows."""

    column: str | None = None
    name: str | None = None

    def of(self, table: Table, record: Record) -> str:
        """Return the name of a row's teacher.

        Raises:
            DataError: the row names no teacher.
        """
        if self.name is not None:
            return self.name
        value = record.values.get(self.column or "")
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{table.name}, {record.place}: column {self.column!r} (task.teacher_column) names "
                f"no teacher (got {value!r:.80}); write the name of one of the teachers"
            )
        return value.strip()

    def columns(self, table: Table, record: Record) -> dict[str, object]:
        """Return the values of `route` and `place` for a row; see `of`."""
        return {ROUTE: self.of(table, record), PLACE: f"{Path(table.name).name}, {record.place}"}


def row_teacher(table: Table, column: str | None, name: str | None = None) -> RowTeacher | None:
    """Return where the teachers of a table come from; None if its rows name none.

    Args:
        table: the rows.
        column: the column with the names; not read if `name` is given.
        name: the teacher of all rows.

    Raises:
        DataError: the column does not exist.
    """
    if name is not None:
        return RowTeacher(name=name)
    if column is None:
        return None
    require(table, column, "task.teacher_column")
    return RowTeacher(column=column)


def without_routes(rows: Dataset) -> Dataset:
    """Return rows without the columns of their teachers, such as held-out rows."""
    gone = {ROUTE} if is_chat(rows) else {ROUTE, PLACE}  # conversations have places of their own
    return rows.remove_columns([name for name in rows.column_names if name in gone])


def names_of(rows: Dataset) -> NDArray[np.str_]:
    """Return [N] the name of the teacher of every row."""
    return np.asarray(rows.select_columns(ROUTE).with_format("numpy")[:][ROUTE])


def check_routes(rows: Dataset, teachers: Sequence[str]) -> None:
    """Check that the training rows name the teachers of the config, and log the numbers of rows.

    Raises:
        DataError: a row names an unknown teacher, or no row names one of the teachers.
    """
    names = names_of(rows)
    counts = _counted(names)
    for name in counts:
        if name not in teachers:
            row = int(np.flatnonzero(names == name)[0])
            raise DataError(
                f'{rows[row][PLACE]}: there is no teacher "{name}"{suggestion(name, teachers)} '
                f"(known: {', '.join(teachers)}; {counts[name]} row(s) name it)"
            )
    unused = [name for name in teachers if name not in counts]
    if unused:
        raise DataError(
            f"teachers: no training row names {' or '.join(unused)} (the rows name "
            f"{', '.join(counts)}); remove the teacher from the list, or check task.teacher_column"
        )
    parts = (f"{n}: {counts[n]} ({counts[n] / len(rows):.1%})" for n in teachers)
    logger.info("training rows by teacher: %s", ", ".join(parts))


def rows_of_teachers(rows: Dataset) -> dict[str, int]:
    """Return the number of rows that name each teacher, by name, in the order of the rows."""
    return _counted(names_of(rows))


def _counted(names: NDArray[np.str_]) -> dict[str, int]:
    return dict(Counter(names.tolist()))
