"""Labels of rows: one class or several, and scores, read strictly."""

from __future__ import annotations

import ast
import difflib
import json
import logging
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
from megakd.data.arrow import PLACE, remembered, with_column
from megakd.data.batch import IGNORE
from megakd.data.records import BadRows, Record, Table, text_of
from megakd.errors import DataError

logger = logging.getLogger(__name__)

INTEGER = re.compile(r"[+-]?\d+(\.0*)?")
PADDED = re.compile(r"0\d")
MAX_NAMES_SHOWN = 8
MOST_COMPARED = 1000
"""Class names of which the nearest one to a wrong label is named."""
NO_CLASS = -1
"""`datasets` writes this number into a column with class names for a row without a class."""

BITS = {"1": "1", "true": "1", "0": "0", "false": "0", "": "", "none": "", "nan": ""}
"""What a cell of 0 and 1 says, in lower case and without decimals."""
NAME_SIGNS = " _-'."
"""Signs that separate no labels."""
LIST_TEXT = re.compile(r"""(?s)\[.*\]|(?:array|tensor)\(\[.*\)|[({]\s*['"].*[)}]|\(\)|set\(\)""")
NUMPY_TEXT = re.compile(r"""['"]\s+['"]|\A\[(?:[\s\d.]|True|False)+\]\Z""")
"""A list as NumPy prints it, without commas; Python joins its words to one."""


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their numbers.

    numbered: whether a number is a label, beside a name.
    folds_case: whether a name in another case is a class, where it can be only one.
    unlabelled: numbers that mean "no label".
    are_of_rows: whether the training rows alone tell the names.
    """

    names: tuple[str, ...]
    numbered: bool
    unlabelled: frozenset[int] = frozenset({IGNORE})
    folds_case: bool = False
    are_of_rows: bool = False

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
        whose = "the training rows" if self.are_of_rows else "this data set"
        cure = "; correct it, or name all labels in task.labels" if self.are_of_rows else ""
        if integer is not None and {"0", str(len(self.names) - 1)} <= self._numbers.keys():
            raise DataError(
                f"label {integer} is outside 0..{len(self.names) - 1}, the {len(self.names)} "
                f"classes of {whose}; a row without a label has an empty label or {IGNORE}{cure}"
            )
        close = difflib.get_close_matches(word, self.names[:MOST_COMPARED], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        if self.names[:1] == ("LABEL_0",):
            hint = "; write the data's labels into id2label of the model's config.json"
        shown = ", ".join(self.names[:MAX_NAMES_SHOWN])
        more = ", …" if len(self.names) > MAX_NAMES_SHOWN else ""
        raise DataError(
            f"label {word!r} is not one of the {len(self.names)} classes of {whose} "
            f"({shown}{more}){hint}{cure}"
        )


def class_word(name: str, column: str, record: Record) -> str | None:
    """Return the label of a row as text, maybe of a list with one; None: a row without a label."""
    value = _plain(record.values.get(column))
    if isinstance(value, list) and len(labels := cast("list[object]", value)) == 1:
        value = _plain(labels[0])
    if isinstance(value, str):
        word = text_of(name, column, Record(record.place, {column: value})).strip()
        return None if word.lower() in ("", "nan") or _integer(word) == IGNORE else word
    if value is None or value == IGNORE or value != value:  # noqa: PLR0124 (NaN)
        return None
    if isinstance(value, bool | int):
        return str(value).lower()
    hint = "scores need task.type: regression, and probabilities a column in task.soft_labels"
    if isinstance(value, list):
        hint = "where a row has several, every row has a list"
    raise DataError(
        f"{name}, {record.place}: label {value!r} in column {column!r} is not a class; a "
        f"class is a whole number or a word ({hint})"
    )


def _plain(value: object) -> object:
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def _list_of(
    name: str, column: str, record: Record, separator: str | None = None
) -> list[object] | None:
    # The labels of a cell that holds a list, is one as JSON or Python writes it, or has texts with
    # a separator; else None.
    value = _plain(record.values.get(column))
    if isinstance(value, list | tuple | set):
        return list(cast("list[object]", value))
    if not isinstance(value, str):
        return None
    word = value.strip()
    if LIST_TEXT.fullmatch(word):
        is_printed = NUMPY_TEXT.search(word)
        for parse in (json.loads,) if is_printed else (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                if isinstance(labels := parse(word), list | tuple | set):
                    return list(labels)
        if is_printed or "," in word or word[0] != "[" or word[1:2] in "'\"":  # no name like [joy]
            raise DataError(
                f"{name}, {record.place}: label {word!r} in column {column!r} looks like a list, "
                'but is neither JSON nor Python; write ["joy", "love"], or joy,love with '
                "task.label_separator; or set task.multi_label: false if it is a name"
            )
    if separator is None:
        return None
    return [part for part in map(str.strip, word.split(separator)) if part]


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


def find_classes(
    rows: Dataset, column: str, names: Sequence[str], *, name: str, has_lists: bool = True
) -> Classes:
    """Return the class names that the data declares, else the numbers 0..n-1, else the words.

    Args:
        rows: training rows with the labels as texts.
        column: column of the labels in the file, for messages, which call the rows `name`.
        names: the class names that the file declares.
        has_lists: whether a text such as "['joy', 'love']" is no name.
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

    for word in others if has_lists and not isinstance(rows.features["label"], List) else ():
        if _list_of(name, column, Record(place(word), {column: word})) is not None:
            raise DataError(
                f"{place(word)}: label {word!r} is a list beside single labels; write all labels "
                "as lists, or set task.multi_label: false if it is a name"
            )
    if others and numbers:
        pair = next(word for word in words if integers[word] is not None), others[0]
        shown = " and ".join(f"{word!r} ({place(word)})" for word in pair)
        raise DataError(
            f"{name}: the labels mix numbers and words: {shown}; use only numbers or only words"
        )
    if others:
        return Classes(tuple(sorted(words)), numbered=False, are_of_rows=True)
    count = len(numbers)
    wrong = next((n for n in sorted(numbers) if not 0 <= n < count), None)
    if wrong is not None:
        raise DataError(
            f"{place(numbers[wrong])}: label {wrong} is outside 0..{count - 1}, although there are "
            f"{count} different labels: classes are numbered from 0 without gaps; renumber the "
            "classes, or use words"
        )
    return Classes(tuple(map(str, range(count))), numbered=True, are_of_rows=True)


def with_numbers(rows: Dataset, classes: Classes, *, bad: BadRows) -> Dataset:
    """Return rows with class numbers as labels, and -100 without a label.

    A list of labels becomes a 0 or 1 for every class, or all -100 without a list.
    """
    words, codes, rows_of = _words(rows)
    numbers = np.full(len(words) + 1, IGNORE, np.int64)  # the last one: rows without a label
    errors: dict[int, DataError] = {}
    is_list = isinstance(rows.features["label"], List)
    for code, word in enumerate(words):
        try:
            numbers[code] = classes.number(word)
        except DataError as error:
            errors[code] = error
        else:
            if is_list and numbers[code] == IGNORE:
                errors[code] = DataError(f"label {word} in a list means no label; remove it")
    is_wrong = np.isin(codes, list(errors))
    # The first wrong label of a row is named.
    wrong = dict(zip(rows_of[is_wrong][::-1].tolist(), codes[is_wrong][::-1].tolist(), strict=True))
    for row in sorted(wrong):
        with bad:
            raise DataError(f"{rows[row][PLACE]}: {errors[wrong[row]]}")
    bad.finish()
    labels: NDArray = numbers[codes]
    if is_list:
        labels = np.zeros((len(rows), len(classes.names)), np.int8)
        labels[rows_of[~is_wrong], numbers[codes[~is_wrong]]] = 1
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


# Several labels of a row


class LabelForm(NamedTuple):
    """How the labels of a row with any number of them are written: as a list, unless said here.

    separator: the text between the labels in a cell.
    columns: a column of 0 and 1 per label.
    flags: the labels, where the list of a row has a 0 or 1 for each of them.
    """

    separator: str | None = None
    columns: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


def label_form(table: Table, column: str, task: TaskConfig) -> LabelForm | None:
    """Return how several labels are written; None if a row has one, as the first label shows.

    Raises a DataError if the lists hold 0 and 1 for labels that `task.labels` does not name.
    """
    if task.type != "classification" or task.multi_label is False:
        return None
    if isinstance(task.label_column, tuple):
        return LabelForm(columns=task.label_column)
    separator = task.label_separator
    is_list, count, doubt = remembered(
        lambda: _shape_of_lists(table, column, separator),
        *("shape_of_lists", table.digest, column, separator),
    )
    if doubt:
        logger.warning(
            "%s, column %r: no cell contains %r (task.label_separator), %s; set the key to the "
            "text between the labels",
            *(table.name, column, separator, doubt),
        )
    names = task.labels or ()
    if column in table.class_names or not count:
        return LabelForm(separator) if is_list or task.multi_label else None
    if len(names) != count:
        raise DataError(
            f"{table.name}: the lists in column {column!r} are {count} zeros and ones, one for "
            f"each label; name these {count} labels in task.labels, in the order of the lists "
            f"({f'it names {len(names)}' if names else 'it is not set'})"
        )
    return LabelForm(separator, flags=names)


def _shape_of_lists(table: Table, column: str, separator: str | None) -> tuple[bool, int, str]:
    # Whether the first label is a list; how many zeros and ones the lists have, if they have one
    # for each label; and what speaks against the separator.
    seen, signs, is_used, count = set[tuple[str, ...]](), Counter[str](), False, 0
    for row in table.records():
        cell = row.values.get(column) if isinstance(row, Record) else None
        if isinstance(row, DataError) or cell in (None, "", IGNORE):
            continue
        labels: list[object] | None = []
        with suppress(DataError):  # a list that cannot be read
            labels = _list_of(table.name, column, row, separator)
        if labels is None and not seen:
            return False, 0, ""
        seen.add(tuple(map(_bit, labels or ())))
        count = count or (len(labels) if labels and _repeats_bits(labels) else 0)
        if separator is not None and isinstance(cell, str) and not LIST_TEXT.fullmatch(cell):
            is_used = is_used or separator in cell
            signs.update({sign for sign in cell if not (sign.isalnum() or sign in NAME_SIGNS)})
    if {("0", "1"), ("1", "0")} <= seen and {*map(len, seen)} <= {0, 2}:
        count = 2  # numbers of labels have no two orders
    others = "".join(f"{n} contain {sign!r}" for sign, n in signs.most_common(1))
    return bool(seen), count, "" if is_used else others


def _repeats_bits(labels: Sequence[object]) -> bool:
    bits = {*map(_bit, labels)}
    return bits <= {"0", "1"} and len(bits) < len(labels)


def _bit(cell: object) -> str:
    word = str(_plain(cell)).strip().lower()
    integer = _integer(word)
    return BITS.get(word if integer is None else str(integer), "?")


def label_words(name: str, column: str, record: Record, form: LabelForm) -> list[str] | None:
    """Return the labels of a row as texts, maybe none; None for a row whose labels are missing."""
    if form.columns:
        return _of_bits(name, record, form.columns)
    value = _plain(record.values.get(column))
    if value != value or value in (None, IGNORE, str(IGNORE)):  # noqa: PLR0124 (NaN)
        return None
    has_empty_cells = form.separator is None or form.flags  # else they have no label
    if has_empty_cells and isinstance(value, str) and not value.strip():
        return None
    labels = _list_of(name, column, record, form.separator)
    if labels is None:
        raise DataError(
            f"{name}, {record.place}: label {value!r} in column {column!r} stands beside "
            f"{'lists' if form.separator is None else 'texts'} of labels; write all labels as "
            "lists, or all as texts, joined by task.label_separator"
        )
    if form.flags:
        if len(labels) != len(form.flags):
            raise DataError(
                f"{name}, {record.place}: label {value!r} in column {column!r} is not a list of "
                f"{len(form.flags)} zeros and ones, one for each label of task.labels; correct it"
            )
        cells = Record(record.place, dict(zip(form.flags, labels, strict=True)))
        return _of_bits(name, cells, form.flags, f"label %r of the list {value!r}")
    if _repeats_bits(labels):
        raise DataError(
            f"{name}, {record.place}: the list {value!r} in column {column!r} names a label twice; "
            "name it once, or write a 0 or 1 for each label in the lists of all rows"
        )
    cells = (Record(record.place, {column: one}) for one in labels)
    words = [class_word(name, column, cell) for cell in cells]
    if None in words:
        raise DataError(
            f"{name}, {record.place}: the list {value!r} in column {column!r} has an empty label; "
            "remove it (a row without any label has an empty list)"
        )
    return cast("list[str]", words)


def _of_bits(
    name: str, record: Record, labels: tuple[str, ...], where: str = "column %r (task.label_column)"
) -> list[str] | None:
    bits = {label: _bit(record.values.get(label)) for label in labels}
    if not any(bits.values()):
        return None
    wrong = next((label for label, bit in bits.items() if bit not in ("0", "1")), None)
    if wrong is not None:
        raise DataError(
            f"{name}, {record.place}: {where.replace('%r', repr(wrong), 1)} must be 0 or 1 (got "
            f"{record.values.get(wrong)!r}); a row whose labels are unknown has all of these cells "
            "empty"
        )
    return [label for label, bit in bits.items() if bit == "1"]
