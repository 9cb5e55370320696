"""Strict reading of label columns: class numbers, class names or scores."""

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

import numpy as np

from megakd.contract.batch import IGNORE
from megakd.data.arrow import remembered
from megakd.data.tables import Record, Table, document_of, text_of
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

    numbered: whether the data holds class numbers instead of names.
    folds_case: whether a name in another case is a class, where it can be only one.
    unlabelled: numbers that mean "no label".
    """

    names: tuple[str, ...]
    numbered: bool
    unlabelled: frozenset[int] = frozenset({IGNORE})
    folds_case: bool = False

    @cached_property
    def number_of(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def _digits_are_names(self) -> bool:
        # Whether a class is called by the number of another, so that 1 can only be a name.
        return any(_integer(name) not in {None, n} for n, name in enumerate(self.names))

    @cached_property
    def _number_in_any_case(self) -> Mapping[str, int]:
        folded = [name.casefold() for name in self.names] if self.folds_case else []
        once = {name for name, count in Counter(folded).items() if count == 1}
        return {name: number for number, name in enumerate(folded) if name in once}

    def label(self, table: Table, column: str, record: Record) -> int:
        value, may_be_number = _class_value(table, column, record), self.numbered
        class_names = table.class_names.get(column)
        if class_names is not None and isinstance(value, int):
            value, may_be_number = _own_name(class_names, value, table, record), False
        if value is None:
            return IGNORE
        if (number := self.number_of.get(str(value))) is not None:
            return number
        if (number := self._number_in_any_case.get(str(value).casefold())) is not None:
            return number
        if may_be_number and (number := _integer(value)) is not None:
            return self._checked(number, table, record)
        raise DataError(f"{table.name}, {record.place}: label {value!r} {self._unknown(value)}")

    def _checked(self, number: int, table: Table, record: Record) -> int:
        if self._digits_are_names and str(number) in self.number_of:
            return self.number_of[str(number)]  # 2.0 is the class "2"
        if number in self.unlabelled:
            return IGNORE
        if self._digits_are_names:
            raise DataError(f"{table.name}, {record.place}: label {number} {self._unknown(number)}")
        if 0 <= number < len(self.names):
            return number
        raise DataError(
            f"{table.name}, {record.place}: label {number} is outside 0..{len(self.names) - 1}, "
            f"the {len(self.names)} classes of this data set; a row without a label has "
            f"an empty label or {IGNORE}"
        )

    def _unknown(self, value: int | str) -> str:
        is_small = len(self.names) <= MOST_COMPARED
        close = difflib.get_close_matches(str(value), self.names, n=1) if is_small else ()
        hint = f"; did you mean {close[0]!r}?" if close else ""
        if self.names[:1] == ("LABEL_0",):
            hint = "; write the data's labels into id2label of the model's config.json"
        shown = ", ".join(self.names[:MAX_NAMES_SHOWN])
        more = ", …" if len(self.names) > MAX_NAMES_SHOWN else ""
        return f"is not one of the {len(self.names)} classes of this data set ({shown}{more}){hint}"


def find_classes(table: Table, column: str, *, text: Sequence[str]) -> Classes:
    """Return the class names that a table declares, else the numbers 0..n-1, else the words.

    Rows whose columns of `text` cannot be read have no say.
    """
    if column in table.class_names:
        unlabelled = frozenset({NO_CLASS, IGNORE})
        return Classes(table.class_names[column], numbered=True, unlabelled=unlabelled)
    parts = ("classes", table.digest, table.format, table.columns, column, text)
    names, numbered = remembered(lambda: _classes_of(table, column, text), *parts)
    return Classes(tuple(names), numbered=numbered)


def _classes_of(table: Table, column: str, text: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    first_seen = _first_seen(table, column, text)
    numbers = _all_integers(table, first_seen)
    if len(first_seen if numbers is None else numbers) < 2:
        raise DataError(
            f"{table.name}: all labels in column {column!r} are {next(iter(first_seen))!r}; "
            "classification needs at least 2 classes"
        )
    if numbers is None:
        return tuple(sorted(map(str, first_seen))), False
    count = len(numbers)
    for number, place in sorted(numbers.items()):
        if not 0 <= number < count:
            raise DataError(
                f"{table.name}, {place}: label {number} is outside 0..{count - 1}, although there "
                f"are {count} different labels: classes are numbered from 0 without gaps; renumber "
                "the classes, or use words"
            )
    return tuple(map(str, range(count))), True


def _first_seen(table: Table, column: str, text: Sequence[str]) -> dict[int | str, str]:
    # By label, the place of its first row.
    first_seen: dict[int | str, str] = {}
    refused: DataError | None = None
    for record in table.records():
        try:
            document_of(table.name, text, record)
            value = _class_value(table, column, record)
        except DataError as error:  # bad rows are named together when the rows are read
            refused = refused or error
            continue
        if value is not None:
            first_seen.setdefault(value, record.place)
    if refused and len(first_seen) < 2:
        raise refused
    if not first_seen:
        raise DataError(
            f"{table.name}: column {column!r} has no label in any row; add labels to the training "
            "rows, or set task.label_column to another column"
        )
    return first_seen


def _class_value(table: Table, column: str, record: Record) -> int | str | None:
    value = record.values.get(column)
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return value if value != IGNORE else None
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        return None if math.isnan(value) or value == IGNORE else int(value)
    if isinstance(value, str):
        word = text_of(table.name, column, record).strip()
        return None if word.lower() in ("", "nan") or _integer(word) == IGNORE else word
    raise DataError(
        f"{table.name}, {record.place}: label {value!r} in column {column!r} is not a class; a "
        "class is a whole number or a word (scores need task.type: regression)"
    )


def score(table: Table, column: str, record: Record) -> float:
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
        f"{table.name}, {record.place}: {value!r} in column {column!r} is not a finite number "
        "of at most 3.4e38 (float32); task.type regression needs a number as label, with "
        "digits, a decimal point and an exponent only"
    )


def _own_name(names: Sequence[str], number: int, table: Table, record: Record) -> str | None:
    if number == NO_CLASS:
        return None
    if 0 <= number < len(names):
        return names[number]
    raise DataError(
        f"{table.name}, {record.place}: label {number} is outside 0..{len(names) - 1}, the "
        f"{len(names)} class names that the file declares ({', '.join(names[:MAX_NAMES_SHOWN])}); "
        f"a row without a label has an empty label, {NO_CLASS} or {IGNORE}"
    )


def _integer(value: int | str) -> int | None:
    if isinstance(value, int):
        return value
    return int(float(value)) if INTEGER.fullmatch(value) and len(value) < 16 else None


def _all_integers(table: Table, first_seen: Mapping[int | str, str]) -> dict[int, str] | None:
    if any(isinstance(value, str) and PADDED.match(value) for value in first_seen):
        return None  # 007 is a name
    # In reverse order, so that the place of the first row is kept for "1" and "1.0".
    numbers = {_integer(value): place for value, place in reversed(list(first_seen.items()))}
    words = [value for value in first_seen if _integer(value) is None]
    if not words:
        return {number: place for number, place in numbers.items() if number is not None}
    if len(words) < len(first_seen):
        number = next(value for value in first_seen if _integer(value) is not None)
        raise DataError(
            f"{table.name}: the labels mix numbers and words: {number!r} ({first_seen[number]}) "
            f"and {words[0]!r} ({first_seen[words[0]]}); use only numbers or only words"
        )
    return None
