"""Labels of rows with any number of them: how they are written, read strictly."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE
from megakd.data.arrow import Record, Table
from megakd.data.labels import class_word
from megakd.errors import DataError

YES, NO = frozenset(("1", "1.0", "true")), frozenset(("0", "0.0", "false"))


class LabelForm(NamedTuple):
    """How the labels of a row with any number of them are written: as a list, unless said here.

    separator: the text between the labels in a cell.
    columns: a column of 0 and 1 per label.
    """

    separator: str | None = None
    columns: tuple[str, ...] = ()


def label_form(table: Table, column: str, task: TaskConfig) -> LabelForm | None:
    """Return how several labels are written; None if a row has one, as the first label shows."""
    if task.type != "classification" or task.multi_label is False:
        return None
    if isinstance(task.label_column, tuple):
        return LabelForm(columns=task.label_column)
    if task.label_separator is not None or task.multi_label:
        return LabelForm(task.label_separator)
    values = (row.values.get(column) for row in table.records() if isinstance(row, Record))
    first = next((value for value in values if value not in (None, "")), None)
    return LabelForm() if isinstance(first, list) else None


def label_words(name: str, column: str, record: Record, form: LabelForm) -> list[str] | None:
    """Return the labels of a row as texts, maybe none; None for a row whose labels are missing."""
    if form.columns:
        return _of_columns(name, record, form.columns)
    value = record.values.get(column)
    if form.separator is not None and isinstance(value, str) and value.strip() != str(IGNORE):
        value = [part for part in map(str.strip, value.split(form.separator)) if part]
    elif form.separator is not None and isinstance(value, list):
        raise DataError(
            f"{name}, {record.place}: column {column!r} holds a list, and task.label_separator "
            "is for labels in one text; remove the key, or write all labels as texts"
        )
    if value is None or value in (IGNORE, str(IGNORE)):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, list):
        raise DataError(
            f"{name}, {record.place}: label {value!r} in column {column!r} stands beside lists of "
            "labels; write a list in every row, or set task.label_separator and write texts"
        )
    cells = (Record(record.place, {column: one}) for one in cast("list[object]", value))
    words = [class_word(name, column, cell) for cell in cells]
    if None in words:
        raise DataError(
            f"{name}, {record.place}: the list {value!r} in column {column!r} has an empty label; "
            "remove it (a row without any label has an empty list)"
        )
    return cast("list[str]", words)


def _of_columns(name: str, record: Record, columns: tuple[str, ...]) -> list[str] | None:
    cells = {column: record.values.get(column) for column in columns}
    if all(cell is None or cell == "" for cell in cells.values()):
        return None
    words = {column: str(cell).strip().lower() for column, cell in cells.items()}
    wrong = next((column for column, word in words.items() if word not in YES | NO), None)
    if wrong is not None:
        raise DataError(
            f"{name}, {record.place}: column {wrong!r} (task.label_column) must be 0 or 1 (got "
            f"{cells[wrong]!r}); a row whose labels are unknown has all of these cells empty"
        )
    return [column for column, word in words.items() if word in YES]
