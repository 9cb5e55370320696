"""Labels of rows with any number of them, and soft labels: how they are written, read strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from datasets import Dataset, List

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, SOFT
from megakd.data.arrow import PLACE, BadRows, Record, Table, remembered, with_column
from megakd.data.labels import class_word
from megakd.data.readers import parse_json
from megakd.errors import DataError, listed

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

    def starts_with_list() -> bool:
        values = (row.values.get(column) for row in table.records() if isinstance(row, Record))
        return isinstance(next((v for v in values if v not in (None, "")), None), list)

    is_list = remembered(starts_with_list, "label_form", table.digest, column)
    return LabelForm() if is_list else None


def label_words(name: str, column: str, record: Record, form: LabelForm) -> list[str] | None:
    """Return the labels of a row as texts, maybe none; None for a row whose labels are missing."""
    if form.columns:
        return _of_columns(name, record, form.columns)
    value = record.values.get(column)
    if value is None or value in (IGNORE, str(IGNORE)):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    if form.separator is not None and isinstance(value, str):
        value = [part for part in map(str.strip, value.split(form.separator)) if part]
    elif form.separator is not None or not isinstance(value, list):
        raise DataError(
            f"{name}, {record.place}: label {value!r} in column {column!r} stands beside "
            f"{'lists' if form.separator is None else 'texts'} of labels; write all labels as "
            "lists, or all as texts, joined by task.label_separator"
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


ROUNDING = 0.01
"""By how much probabilities of one label may miss the sum of 1, as rounded numbers do."""


def soft_text(name: str, column: str, record: Record) -> str:
    """Return the probabilities of a row as JSON."""
    value = record.values.get(column)
    if value is None or value == "":
        raise DataError(
            f"{name}, {record.place}: column {column!r} (task.soft_labels) is empty, and every "
            "training row needs the answers of the teacher; fill it, or remove the row"
        )
    return value if isinstance(value, str) else json.dumps(value, default=float)


def with_soft_labels(rows: Dataset, names: Sequence[str], *, bad: BadRows) -> Dataset:
    """Return rows with their probabilities as float32 by class; those of one label sum to 1."""
    adds_up = not isinstance(rows.features["label"], List)
    soft, right = np.zeros((len(rows), len(names)), np.float32), list[int]()
    for number, (place, text) in enumerate(zip(rows[PLACE], rows[SOFT], strict=True)):
        with bad:
            soft[number] = _probabilities(place, text, names, adds_up=adds_up)
            right.append(number)
    bad.finish()
    if adds_up:
        soft[right] /= soft[right].sum(axis=1, keepdims=True)
    whole = rows if len(right) == len(rows) else rows.select(right)
    return with_column(whole.remove_columns(SOFT), SOFT, soft[right])


def _probabilities(place: str, text: str, names: Sequence[str], *, adds_up: bool) -> list[float]:
    where = f"{place}: soft labels (task.soft_labels)"
    value: Any = parse_json(text, where)
    if isinstance(value, dict):
        by_name = cast("dict[str, Any]", value)
        value = [by_name.pop(name, None) for name in names]
        value += by_name.values()  # of other labels
    if not isinstance(value, list) or len(value) != len(names):
        count = f"{len(value)} numbers" if isinstance(value, list) else repr(value)
        raise DataError(
            f"{where} are {count}, and there are {len(names)} labels ({listed(list(names))}); give "
            "a number for each, in this order or by name"
        )
    for name, one in zip(names, value, strict=True):
        is_number = isinstance(one, int | float) and not isinstance(one, bool)
        if not (is_number and 0 <= one <= 1):
            raise DataError(
                f"{where}: {name!r} has {one!r}, which is no probability from 0 to 1; apply a "
                f"{'softmax' if adds_up else 'sigmoid'} to logits"
            )
    if adds_up and abs(sum(value) - 1) > ROUNDING:
        raise DataError(
            f"{where} sum to {sum(value):.3g}, and a row has one label; normalise them to a sum "
            "of 1, or write the labels as lists if a row may have several"
        )
    return value
