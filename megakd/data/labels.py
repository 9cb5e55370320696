"""Labels of rows: class names and numbers, read strictly, and scores."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, List
from numpy.typing import NDArray

from megakd.contract.batch import IGNORE
from megakd.data.arrow import PLACE, BadRows, Record, text_of, with_column
from megakd.errors import DataError

INTEGER = re.compile(r"[+-]?\d+(\.0*)?")
PADDED = re.compile(r"0\d")
MAX_NAMES_SHOWN = 8
MOST_COMPARED = 1000
"""Class names of which the nearest one to a wrong label is named."""
NO_CLASS = -1
"""`datasets` writes this number into a column with class names for a row without a class."""


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
    # Codes are numbered by their first rows; -1, if a row has no label, comes before them.
    earliest = rows_of[np.unique(codes, return_index=True)[1][-len(words) :]]
    first = dict(zip(words, earliest, strict=True))
    if others and numbers:
        pair = next(word for word in words if integers[word] is not None), others[0]
        shown = " and ".join(f"{word!r} ({rows[int(first[word])][PLACE]})" for word in pair)
        raise DataError(
            f"{name}: the labels mix numbers and words: {shown}; use only numbers or only words"
        )
    if others:
        return Classes(tuple(sorted(words)), numbered=False)
    count = len(numbers)
    wrong = next((n for n in sorted(numbers) if not 0 <= n < count), None)
    if wrong is not None:
        place = rows[int(first[numbers[wrong]])][PLACE]
        raise DataError(
            f"{place}: label {wrong} is outside 0..{count - 1}, although there are {count} "
            "different labels: classes are numbered from 0 without gaps; renumber the classes, or "
            "use words"
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
    return with_column(rows.remove_columns("label"), "label", labels)


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
