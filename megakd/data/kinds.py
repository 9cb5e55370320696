"""The kind of the rows of a table: text, pair of texts, document or conversation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from datasets import Features, Value

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, ROUTE
from megakd.contract.tasks import LANGUAGE_TASKS, TaskType
from megakd.data.arrow import PLACE
from megakd.data.chat.conversations import (
    CONVERSATION,
    OPTIONS,
    TEXT_DEFAULTS,
    TOOLS,
    ChatColumns,
    chat_columns,
    conversation_of,
)
from megakd.data.labels import Classes, score
from megakd.data.tables import Record, SplitName, Table, document_of, require, text_of
from megakd.errors import DataError

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
