"""Labels of rows: one class or several, scores, and soft labels, read strictly."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, List
from numpy.typing import NDArray

from megakd.config.task import TaskConfig
from megakd.data.arrow import PLACE, BadRows, Record, Table, remembered, text_of, with_column
from megakd.data.batch import IGNORE, SOFT
from megakd.data.readers import parse_json
from megakd.errors import DataError, listed, suggestion

INTEGER = re.compile(r"[+-]?\d+(\.0*)?")
PADDED = re.compile(r"0\d")
MAX_NAMES_SHOWN = 8
MOST_COMPARED = 1000
"""Class names of which the nearest one to a wrong label is named."""
NO_CLASS = -1
"""`datasets` writes this number into a column with class names for a row without a class."""

YES, NO = frozenset(("1", "1.0", "true")), frozenset(("0", "0.0", "false"))
ROUNDING = 0.01
"""By how much probabilities of one label may miss the sum of 1, as rounded numbers do."""


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their numbers.

    numbered: whether a number is a label, beside a name.
    folds_case: whether a name in another case is a class, where it can be only one.
    unlabelled: numbers that mean "no label".
    """

    names: tuple[str, ...]
    numbered: bool
    unlabelled: frozenset[int] = frozenset({IGNORE})
    folds_case: bool = False

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        numbers = {name: number for number, name in enumerate(self.names)}
        # Where a class is called by the number of another, 1 can only be a name.
        if self.numbered and all(_integer(name) in {None, n} for name, n in numbers.items()):
            numbers |= {str(number): number for number in range(len(self.names))}
        return numbers

    @cached_property
    def _folded(self) -> Mapping[str, int]:
        folded = [name.casefold() for name in self.names] if self.folds_case else []
        counts = Counter(folded)
        return {name: number for number, name in enumerate(folded) if counts[name] == 1}

    def number(self, word: str) -> int:
        """Return the number of the class of a label, or -100 for one that means no label."""
        integer = _integer(word) if self.numbered else None
        number = self._numbers.get(word, self._folded.get(word.casefold()))
        if number is None:
            number = self._numbers.get(str(integer))  # 2.0 is the class "2"
        if number is not None:
            return number
        if integer in self.unlabelled:
            return IGNORE
        if integer is not None and {"0", str(len(self.names) - 1)} <= self._numbers.keys():
            raise DataError(
                f"label {integer} is outside 0..{len(self.names) - 1}, the {len(self.names)} "
                f"classes of this data set; a row without a label has an empty label or {IGNORE}"
            )
        close = difflib.get_close_matches(word, self.names[:MOST_COMPARED], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        if self.names[:1] == ("LABEL_0",):
            hint = "; write the data's labels into id2label of the model's config.json"
        shown = ", ".join(self.names[:MAX_NAMES_SHOWN])
        more = ", …" if len(self.names) > MAX_NAMES_SHOWN else ""
        raise DataError(
            f"label {word!r} is not one of the {len(self.names)} classes of this data set "
            f"({shown}{more}){hint}"
        )


def class_word(name: str, column: str, record: Record) -> str | None:
    """Return the label of a row as text; None for a row without a label."""
    value = record.values.get(column)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        word = text_of(name, column, record).strip()
        return None if word.lower() in ("", "nan") or _integer(word) == IGNORE else word
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value == IGNORE or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, int):
        return str(value)
    hint = "scores need task.type: regression"
    if isinstance(value, list):
        hint = "where a row has several, every row has a list"
    raise DataError(
        f"{name}, {record.place}: label {value!r} in column {column!r} is not a class; a "
        f"class is a whole number or a word ({hint})"
    )


def score(name: str, column: str, record: Record) -> float:
    """Return the score of a row, or NaN without a score."""
    value = record.values.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    # Python reads 1_000 as 1000.
    is_other = isinstance(value, bool) or (isinstance(value, str) and "_" in value)
    if isinstance(value, int | float | str | Decimal) and not is_other:
        with suppress(ValueError, OverflowError), np.errstate(over="ignore"):
            number = float(value)
            if not np.isinf(np.float32(number)):
                return number
    raise DataError(
        f"{name}, {record.place}: {value!r} in column {column!r} is not a finite number "
        "of at most 3.4e38 (float32); task.type regression needs a number as label, with "
        "digits, a decimal point and an exponent only"
    )


def find_classes(rows: Dataset, column: str, names: Sequence[str], *, name: str) -> Classes:
    """Return the class names that the data declares, else the numbers 0..n-1, else the words.

    Args:
        rows: training rows with the labels as texts.
        column: column of the labels in the file, for messages, which call the rows `name`.
        names: the class names that the file declares.
    """
    if names:
        unlabelled = frozenset({NO_CLASS, IGNORE})
        return Classes(tuple(names), numbered=True, unlabelled=unlabelled)
    words, codes, rows_of = _words(rows)
    if not words:
        raise DataError(
            f"{name}: column {column!r} has no label in any row; add labels to the training "
            "rows, name the labels in task.labels, or set task.label_column to another column"
        )

    padded = any(map(PADDED.match, words))  # 007 is a name
    integers = {word: None if padded else _integer(word) for word in words}
    numbers = {n: word for word, n in reversed(integers.items()) if n is not None}
    others = [word for word, number in integers.items() if number is None]
    if len(words if others else numbers) < 2:
        raise DataError(
            f"{name}: all labels in column {column!r} are {words[0]!r}; classification needs at "
            "least 2 classes"
        )

    def place(word: str) -> str:
        return rows[int(rows_of[codes == words.index(word)][0])][PLACE]

    if others and numbers:
        pair = next(word for word in words if integers[word] is not None), others[0]
        shown = " and ".join(f"{word!r} ({place(word)})" for word in pair)
        raise DataError(
            f"{name}: the labels mix numbers and words: {shown}; use only numbers or only words"
        )
    if others:
        return Classes(tuple(sorted(words)), numbered=False)
    count = len(numbers)
    wrong = next((n for n in sorted(numbers) if not 0 <= n < count), None)
    if wrong is not None:
        raise DataError(
            f"{place(numbers[wrong])}: label {wrong} is outside 0..{count - 1}, although there are "
            f"{count} different labels: classes are numbered from 0 without gaps; renumber the "
            "classes, or use words"
        )
    return Classes(tuple(map(str, range(count))), numbered=True)


def with_numbers(rows: Dataset, classes: Classes, *, bad: BadRows) -> Dataset:
    """Return rows with class numbers as labels, and -100 without a label.

    A list of labels becomes a 0 or 1 for every class, or all -100 without a list.
    """
    words, codes, rows_of = _words(rows)
    numbers = np.full(len(words) + 1, IGNORE, np.int64)  # the last one: rows without a label
    errors: dict[int, DataError] = {}
    for code, word in enumerate(words):
        try:
            numbers[code] = classes.number(word)
        except DataError as error:
            errors[code] = error
    is_wrong = np.isin(codes, list(errors))
    # The first wrong label of a row is named.
    wrong = dict(zip(rows_of[is_wrong][::-1].tolist(), codes[is_wrong][::-1].tolist(), strict=True))
    for row in sorted(wrong):
        with bad:
            raise DataError(f"{rows[row][PLACE]}: {errors[wrong[row]]}")
    bad.finish()
    labels: NDArray = numbers[codes]
    if isinstance(rows.features["label"], List):
        labels = np.zeros((len(rows), len(classes.names)), np.int8)
        labels[rows_of, numbers[codes]] = 1
        labels[cast("Any", rows.data.column("label")).is_null().to_numpy()] = IGNORE
    if wrong:
        right = np.setdiff1d(np.arange(len(rows)), list(wrong))
        rows, labels = rows.select(right), labels[right]
    return with_column(rows, "label", labels)


def _words(rows: Dataset) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    # The different labels, in the order of their first rows; the label of each row, or -1, or each
    # label of the rows, if they are lists; and the row of each of these.
    column = cast("Any", rows.data.column("label")).combine_chunks()
    rows_of = np.arange(len(rows))
    if isinstance(rows.features["label"], List):
        rows_of = cast("Any", pc).list_parent_indices(column).to_numpy()
        column = column.flatten()
    coded = column.dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.fill_null(-1).to_numpy(), rows_of


def _integer(word: str) -> int | None:
    return int(float(word)) if INTEGER.fullmatch(word) and len(word) < 16 else None


# Several labels of a row, and soft labels


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
    if value in (None, IGNORE, str(IGNORE)) or (isinstance(value, float) and math.isnan(value)):
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
    return with_column(whole, SOFT, soft[right])


def _probabilities(place: str, text: str, names: Sequence[str], *, adds_up: bool) -> list[float]:
    where = f"{place}: soft labels (task.soft_labels)"
    value: Any = parse_json(text, where)
    if isinstance(value, dict):
        by_name = cast("dict[str, Any]", value)
        other = next((name for name in by_name if name not in names), None)
        if other is not None:
            raise DataError(
                f"{where} name {other!r}, which is not one of the {len(names)} labels "
                f"({listed(list(names))}){suggestion(other, names)}"
            )
        value = [by_name.get(name) for name in names]
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
                f"{'softmax' if adds_up else 'sigmoid'} to logits, divide per cents by 100"
            )
    if adds_up and abs(sum(value) - 1) > ROUNDING:
        raise DataError(
            f"{where} sum to {sum(value):.3g}, and a row has one label; normalise them to a sum "
            "of 1, or write the labels as lists if a row may have several"
        )
    return value
