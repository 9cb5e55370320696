"""Choice of the columns of a table, and its rows in Arrow files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from datasets import Dataset, Features, Value

from megakd.config.task import TaskConfig
from megakd.contract.routes import ROUTE
from megakd.contract.tasks import LANGUAGE_TASKS
from megakd.data.bad_rows import BadRows, BlankRows
from megakd.data.cache import PLACE, cached_folder, key_of, read_rows, write_rows
from megakd.data.chat.rows import ChatColumns, chat_columns
from megakd.data.chat_row_files import conversation_rows
from megakd.data.choosing import is_labelled
from megakd.data.labels import Classes, Labeller, find_classes, score
from megakd.data.routes import RowTeacher, row_teacher
from megakd.data.tables import SPLIT_NAMES, SplitName, Table, document_of, require, text_of
from megakd.errors import DataError

if TYPE_CHECKING:
    from megakd.data.text_stream import TextStream

# Increase this number when the same source results in different rows.
VERSION = 2
# Increase this number when a folder of rows gets different files.
LAYOUT = 2
PAIR_DEFAULTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text", "text_pair"),
)
TEXT_DEFAULTS = (("text",), ("sentence",), ("content",), ("document",))
LABEL_DEFAULTS = {"classification": ("label", "labels"), "regression": ("label", "score", "labels")}
DEFAULT_METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "mlm": ("perplexity",),
    "causal_lm": ("perplexity",),
}


class Fields(NamedTuple):
    """The columns that a task reads; label is None if the rows carry no labels."""

    text: tuple[str, ...]
    label: str | None


def rows_of_tables(
    tables: Mapping[SplitName, Table],
    task: TaskConfig,
    *,
    name: str,
    cache_dir: Path,
    classes: Classes | None = None,
    metrics: tuple[str, ...] | None = None,
) -> Found:
    """Return text and labels of every split, in Arrow files.

    Args:
        tables: tables by split, at least `train`.
        task: the task; names the columns, or leaves them to the defaults.
        name: name of the data set in messages.
        cache_dir: folder in which the rows are kept, by a hash of their content.
        classes: the classes if they are known; None reads them from the training split.
        metrics: the official metrics; None takes the usual metrics of the task type.

    Raises:
        DataError: a column does not exist, a value is wrong, or a split has no rows.
    """
    for table in tables.values():
        if next(table.records(), None) is None:
            raise DataError(f"{table.name} has no rows")
    if any(chat_columns(table, task) for table in tables.values()):
        return _conversations(tables, task, name=name, cache_dir=cache_dir)
    train = choose_fields(tables["train"], task)
    if train.label is not None and task.type == "classification" and classes is None:
        classes = find_classes(tables["train"], train.label)
    splits: dict[SplitName, Dataset] = {}
    digests: list[object] = [VERSION, task.type, classes.names if classes else None]
    for split in SPLIT_NAMES:
        if split not in tables:
            continue
        fields = _fields_of(tables[split], split, train)
        teacher = _teacher_of(tables[split], split, task)
        splits[split] = _rows_of(
            tables[split], fields, task, classes, cache_dir=cache_dir, teacher=teacher
        )
        digests.append((split, tables[split].digest, fields, *(teacher or ())))
    return Found(
        name=name,
        splits=splits,
        classes=classes,
        metrics=metrics or DEFAULT_METRICS[task.type],
        source_hash=key_of(digests),
    )


def _conversations(
    tables: Mapping[SplitName, Table], task: TaskConfig, *, name: str, cache_dir: Path
) -> Found:
    columns = {split: conversation_columns(table, task) for split, table in tables.items()}
    return Found(
        name=name,
        splits={
            split: conversation_rows(
                table,
                columns[split],
                cache_dir=cache_dir,
                bad_rows=task.bad_rows,
                teacher=_teacher_of(table, split, task),
            )
            for split, table in tables.items()
        },
        classes=None,
        metrics=DEFAULT_METRICS[task.type],
        source_hash=key_of(
            "chat",
            [(s, tables[s].digest, columns[s]) for s in sorted(tables)],
            *([task.teacher_column] if task.teacher_column else []),
        ),
    )


def _teacher_of(table: Table, split: SplitName, task: TaskConfig) -> RowTeacher | None:
    """Return where the teachers of a split's rows come from; only training rows have teachers."""
    return row_teacher(table, task.teacher_column) if split == "train" else None


def conversation_columns(table: Table, task: TaskConfig) -> ChatColumns:
    """Return the columns of a table that are read as conversations or as documents.

    Raises:
        DataError: a column that the task names does not exist, or there are no usual columns.
    """
    found = chat_columns(table, task)
    return ChatColumns(text=choose_fields(table, task).text) if found is None else found


def scored_rows(
    table: Table,
    task: TaskConfig,
    classes: Classes | None,
    *,
    cache_dir: Path,
    as_chat: bool = False,
) -> Dataset:
    """Return the rows of a file that is only scored, and not used for training or model selection.

    Args:
        table: the rows of the file.
        task: the task; names the columns, or leaves them to the defaults.
        classes: the classes of the training rows; None without classes.
        cache_dir: folder in which the rows are kept, by a hash of their content.
        as_chat: whether the training rows are conversations, so that documents are read as such.

    Raises:
        DataError: a column does not exist, a label is not a class, or no row has a label.
    """
    if next(table.records(), None) is None:
        raise DataError(f"{table.name} has no rows")
    if as_chat or chat_columns(table, task) is not None:
        columns = conversation_columns(table, task)
        return conversation_rows(table, columns, cache_dir=cache_dir, bad_rows=task.bad_rows)
    rows = _rows_of(table, choose_fields(table, task), task, classes, cache_dir=cache_dir)
    if not is_labelled(rows).any():
        raise DataError(f"{table.name} has no labelled rows to score")
    return rows


def unlabelled_rows(
    table: Table, text: tuple[str, ...], task: TaskConfig, *, cache_dir: Path
) -> Dataset:
    """Return the texts of a split in their order; labels are not read.

    Args:
        table: the split.
        text: the columns of text.
        task: the task; `type` determines the placeholder for missing labels.
        cache_dir: folder in which the rows are kept, by a hash of their content.

    Raises:
        DataError: a column does not exist, a value is not text, or there are no rows.
    """
    for column in text:
        require(table, column, "task.text_columns")
    classes = None if task.type == "regression" else Classes((), numbered=True)
    return _rows_of(table, Fields(text, None), task, classes, cache_dir=cache_dir)


def choose_fields(table: Table, task: TaskConfig) -> Fields:
    """Return the columns of texts and labels to read from the training split.

    Raises:
        DataError: a column that the task names does not exist, or the task names no column and
            none of the usual columns exists.
    """
    text = task.text_columns or _usual_text(table, task)
    for column in text:
        require(table, column, "task.text_columns")
    if task.type in LANGUAGE_TASKS:
        return Fields(text, None)
    if task.label_column is not None:
        require(table, task.label_column, "task.label_column")
        return Fields(text, task.label_column)
    usual = LABEL_DEFAULTS[task.type]
    label = next((column for column in usual if column in table.columns), None)
    if label is None:
        raise DataError(
            f"{table.name}: column {usual[0]!r} does not exist; the columns are "
            f"{', '.join(table.columns)}; set task.label_column to the column with the labels"
        )
    return Fields(text, label)


def _usual_text(table: Table, task: TaskConfig) -> tuple[str, ...]:
    pairs = () if task.type in LANGUAGE_TASKS else PAIR_DEFAULTS
    for columns in (*pairs, *TEXT_DEFAULTS):
        if all(column in table.columns for column in columns):
            return columns
    raise DataError(
        f"{table.name}: column 'text' does not exist; the columns are {', '.join(table.columns)}; "
        "set task.text_columns to the columns with the text"
    )


def _fields_of(table: Table, split: SplitName, train: Fields) -> Fields:
    for column in train.text:
        require(table, column, "task.text_columns")
    if train.label is None or (split == "test" and train.label not in table.columns):
        return Fields(train.text, None)
    require(table, train.label, "task.label_column")
    return train


def _features(fields: Fields, task: TaskConfig, teacher: RowTeacher | None) -> Features:
    columns = {"text": Value("string")}
    if teacher is not None:
        columns |= {name: Value("string") for name in (ROUTE, PLACE)}
    if task.type in LANGUAGE_TASKS:
        return Features(columns)
    if len(fields.text) == 2:
        columns["text_pair"] = Value("string")
    columns["label"] = Value("int64" if task.type == "classification" else "float32")
    return Features(columns)


def _rows_of(
    table: Table,
    fields: Fields,
    task: TaskConfig,
    classes: Classes | None,
    *,
    cache_dir: Path,
    teacher: RowTeacher | None = None,
) -> Dataset:
    names = None if classes is None else (classes.names, classes.numbered)
    key = key_of(VERSION, LAYOUT, table.digest, fields, task.type, names, *(teacher or ()))
    if task.bad_rows == "drop":
        key = key_of(key, task.bad_rows)
    labeller = classes.label if classes else score

    def fill(fresh: Path) -> None:
        blank = BlankRows(bad=BadRows(task.bad_rows))
        rows = _rows(table, fields, task.type, labeller, blank=blank, teacher=teacher)
        write_rows(rows, _features(fields, task, teacher), fresh / "rows.arrow")
        blank.write(fresh)

    folder = cached_folder(cache_dir / "rows" / key[:32], fill)
    dataset = read_rows(folder / "rows.arrow")
    if len(dataset) == 0:
        raise DataError(f"{table.name} has no rows")
    are_kept = task.type not in LANGUAGE_TASKS
    BlankRows.tell(folder, table.name, rows=len(dataset), are_kept=are_kept)
    return dataset


def _rows(
    table: Table,
    fields: Fields,
    task_type: str,
    labeller: Labeller,
    *,
    blank: BlankRows,
    teacher: RowTeacher | None,
) -> Iterator[dict[str, object]]:
    """Yield the rows of a split, and count the rows without text and the bad rows in `blank`."""
    for record in table.records():
        with blank.bad:
            named = {} if teacher is None else teacher.columns(table, record)
            if task_type in LANGUAGE_TASKS:
                document = document_of(table.name, fields.text, record)
                if document is None:
                    blank.add(record)
                else:
                    yield {"text": document, **named}
                continue
            texts = [text_of(table.name, column, record) for column in fields.text]
            row: dict[str, object] = dict(zip(("text", "text_pair"), texts, strict=False))
            row["label"] = labeller(table, fields.label or "", record)
            if not all(text.strip() for text in texts):
                blank.add(record)
            yield row | named


@dataclass(frozen=True, kw_only=True)
class Found:
    """The rows of a data set before a selection; columns as in `splits.Splits`.

    name: name of the data set in messages.
    classes: classes with which labels are read; None without classes.
    source_hash: sha256 of the sources of the rows.
    stream: the training texts if they are read during training; the training split is then empty.
    """

    name: str
    splits: Mapping[SplitName, Dataset]
    classes: Classes | None
    metrics: tuple[str, ...]
    source_hash: str
    stream: TextStream | None = None

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        return self.classes.names if self.classes else ()
