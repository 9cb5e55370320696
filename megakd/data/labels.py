"""The kinds of rows, and strict reading of their labels: class numbers, class names or scores."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Features, Value

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, ROUTE
from megakd.contract.tasks import LANGUAGE_TASKS, TaskType
from megakd.data.arrow import (
    PLACE,
    Record,
    SplitName,
    Table,
    document_of,
    remembered,
    require,
    text_of,
)
from megakd.data.chat.conversations import (
    CONVERSATION,
    OPTIONS,
    TEXT_DEFAULTS,
    TOOLS,
    ChatColumns,
    chat_columns,
    conversation_of,
)
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


PAIR_DEFAULTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text", "text_pair"),
)
LABEL_DEFAULTS = {"classification": ("label", "labels"), "regression": ("label", "score", "labels")}


class RowTeacher(NamedTuple):
    """Source of the teacher of a row: a column, or one name for all rows."""

    column: str | None = None
    name: str | None = None

    def of(self, table: Table, record: Record) -> str:
        if self.name is not None:
            return self.name
        value = record.values.get(self.column or "")
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{table.name}, {record.place}: column {self.column!r} (task.teacher_column) names "
                f"no teacher (got {value!r:.80}); write the name of one of the teachers"
            )
        return text_of(table.name, self.column or "", record).strip()


def row_teacher(table: Table, column: str | None, name: str | None = None) -> RowTeacher | None:
    """Return where the teachers of a table come from; None if its rows name none."""
    if name is not None:
        return RowTeacher(name=name)
    if column is None:
        return None
    require(table, column, "task.teacher_column")
    return RowTeacher(column=column)


class Fields(NamedTuple):
    """The columns of texts and labels; label is None if the rows carry no labels."""

    text: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class RowKind:
    """Kind of the rows of a table, and the columns that they are read from.

    fields: the columns of a conversation; or of a text or a pair with its label, or of a document.
    classes: the classes of the labels; None for scores and for rows without labels.
    teacher: where the teachers of training rows come from; None if the rows name none.
    """

    type: TaskType
    fields: ChatColumns | Fields
    classes: Classes | None = None
    teacher: RowTeacher | None = None

    @staticmethod
    def of(
        task: TaskConfig, table: Table, classes: Classes | None = None, *, as_chat: bool = False
    ) -> RowKind:
        """Return the kind of the rows; `as_chat` makes documents conversations without a prompt."""
        chat = chat_columns(table, task)
        if chat is None and as_chat:
            chat = ChatColumns(text=_text_columns(table, task))
        if chat is not None:
            return RowKind(task.type, chat)
        text = _text_columns(table, task)
        return RowKind(task.type, Fields(text, _label_column(table, task)), classes)

    def of_split(self, table: Table, split: SplitName) -> RowKind:
        """Return the kind of another split of texts; a test split may be without labels."""
        for column in self.fields.text:
            require(table, column, "task.text_columns")
        label = self.label
        if label is None or (split == "test" and label not in table.columns):
            return replace(self, fields=Fields(self.fields.text, None))
        require(table, label, "task.label_column")
        return self

    @property
    def is_chat(self) -> bool:
        return isinstance(self.fields, ChatColumns)

    @property
    def has_prompts_alone(self) -> bool:
        """True for conversations whose answers no column can hold."""
        fields = self.fields
        return isinstance(fields, ChatColumns) and not (
            fields.messages or fields.completion or fields.text
        )

    @property
    def label(self) -> str | None:
        return self.fields.label if isinstance(self.fields, Fields) else None

    @property
    def keeps_blank(self) -> bool:
        """True if rows without text are used."""
        return self.type not in LANGUAGE_TASKS

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that a conversation or a document is read from; a table may lack the last."""
        if isinstance(self.fields, Fields):
            return self.fields.text
        return (*filter(None, self.fields[:3]), *self.fields.text, TOOLS, OPTIONS)

    @property
    def features(self) -> Features:
        names = ["text"]
        if self.is_chat:
            names += [CONVERSATION, PLACE]
        elif self.keeps_blank and len(self.fields.text) == 2:
            names.append("text_pair")
        columns = {name: Value("string") for name in names}
        if self.keeps_blank:
            columns["label"] = Value("int64" if self.type == "classification" else "float32")
        if self.teacher is not None:
            columns |= {ROUTE: Value("string"), PLACE: Value("string")}
        return Features(columns)

    def row(self, table: Table, record: Record) -> dict[str, object]:
        """Return a row with the columns of `features`; see `is_blank`."""
        if isinstance(self.fields, ChatColumns):
            conversation = conversation_of(table.name, self.fields, record)
            place = place_of(table, record)
            return {"text": conversation.text, CONVERSATION: conversation.to_json(), PLACE: place}
        text, label = self.fields
        if not self.keeps_blank:
            return {"text": document_of(table.name, text, record)}
        texts = [text_of(table.name, column, record) for column in text]
        if label is None:
            value = IGNORE if self.classes else math.nan
        else:
            value = (self.classes.label if self.classes else score)(table, label, record)
        return {**dict(zip(("text", "text_pair"), texts, strict=False)), "label": value}


def is_blank(row: Mapping[str, object]) -> bool:
    """Return whether a row, or a text of its pair, has no text."""
    return not all(str(row[name]).strip() for name in ("text", "text_pair") if name in row)


def place_of(table: Table, record: Record) -> str:
    """Return the place of a row for messages: the file and the line."""
    return f"{Path(table.name).name}, {record.place}"


def _text_columns(table: Table, task: TaskConfig) -> tuple[str, ...]:
    if task.text_columns is not None:
        for column in task.text_columns:
            require(table, column, "task.text_columns")
        return task.text_columns
    pairs = () if task.type in LANGUAGE_TASKS else PAIR_DEFAULTS
    for columns in (*pairs, *zip(TEXT_DEFAULTS, strict=True)):
        if all(column in table.columns for column in columns):
            return columns
    answers = " or, for prompts with answers, task.prompt_column and task.completion_column"
    raise DataError(
        f"{table.name}: column 'text' does not exist; the columns are {', '.join(table.columns)}; "
        "set task.text_columns to the columns with the text"
        f"{answers if task.type == 'causal_lm' else ''}"
    )


def _label_column(table: Table, task: TaskConfig) -> str | None:
    if task.type in LANGUAGE_TASKS:
        return None
    if task.label_column is not None:
        require(table, task.label_column, "task.label_column")
        return task.label_column
    usual = LABEL_DEFAULTS[task.type]
    label = next((column for column in usual if column in table.columns), None)
    if label is None:
        raise DataError(
            f"{table.name}: column {usual[0]!r} does not exist; the columns are "
            f"{', '.join(table.columns)}; set task.label_column to the column with the labels"
        )
    return label
