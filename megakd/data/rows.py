"""The rows of tables: written to Arrow files once, or read from a stream while they are needed.

The columns of a table are chosen here, which may be those of conversations, of texts or pairs with
labels, or of documents.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megakd.config.task import LANGUAGE_TASKS, TaskConfig, TaskType
from megakd.data.arrow import (
    PLACE,
    TEXTS_AT_ONCE,
    arrow_batches,
    column_of,
    key_of,
    read_rows,
    remembered_of_rows,
    tables_of_rows,
    with_column,
    write_tables,
)
from megakd.data.batch import IGNORE, ROUTE, has_label
from megakd.data.conversations import (
    CONVERSATION,
    FINISH,
    OPTIONS,
    SOURCE,
    TEXT_DEFAULTS,
    TOOLS,
    ChatColumns,
    chat_columns,
    conversation_of,
)
from megakd.data.labels import (
    Classes,
    LabelForm,
    class_word,
    find_classes,
    label_form,
    label_words,
    score,
    with_numbers,
)
from megakd.data.records import (
    SPLIT_NAMES,
    BadRows,
    Record,
    Table,
    document_of,
    no_header,
    require,
    text_of,
)
from megakd.data.soft_labels import SOFT, soft_text, with_soft_labels
from megakd.errors import DataError, suggestion
from megakd.process.seals import whole_folder

logger = logging.getLogger(__name__)

VALIDATION_FRACTION = 0.05

HASH_RANGE = 2**64


def text_hash(text: str, *, salt: str = "") -> int:
    """Return a number below 2**64 that depends only on the text and the salt."""
    digest = hashlib.sha256(f"{salt}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def row_keys(rows: Dataset, *, salt: str = "") -> NDArray[np.uint64]:
    """Return one hash per row, of the text or the pair of texts."""
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    texts = ("\0".join(row) for row in _values(rows, columns))
    return np.fromiter((text_hash(text, salt=salt) for text in texts), dtype=np.uint64)


def prompt_keys(rows: Dataset) -> NDArray[np.uint64]:
    """Return one hash per row, of the prompt of a conversation, or else of the text."""
    return (
        column_of(rows, ASKED).astype(np.uint64) if ASKED in rows.column_names else row_keys(rows)
    )


def _values(rows: Dataset, columns: list[str]) -> Iterator[tuple[str, ...]]:
    for batch in arrow_batches(rows.select_columns(columns), TEXTS_AT_ONCE):
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def is_labelled(rows: Dataset) -> NDArray[np.bool_]:
    """Return a bool per row: whether the row carries a label."""
    if "label" not in rows.column_names:
        return np.ones(len(rows), dtype=np.bool_)
    labels = column_of(rows, "label")
    labels = labels[:, 0] if labels.ndim == 2 else labels  # 0 or 1 for every class
    return has_label(torch.tensor(labels)).numpy()


def cut_validation(rows: Dataset, *, name: str) -> tuple[Dataset, Dataset]:
    """Split the training rows into (rest, validation), with 5 % of the labelled rows, at least one.

    Rows with equal text stay together, and so do all answers to a prompt, so that no held-out text
    or prompt is trained on. A prompt with more than 5 % of the rows is not held out, if another is.
    """
    held, left_out = remembered_of_rows(rows, "cut", lambda: _cut(rows, name))
    return rows.select(np.delete(np.arange(len(rows)), held + left_out)), rows.select(held)


def _cut(rows: Dataset, name: str) -> tuple[list[int], list[int]]:
    keys, prompts, labelled = row_keys(rows), prompt_keys(rows), is_labelled(rows)
    _, numbers, answers = np.unique(prompts, return_inverse=True, return_counts=True)
    # The hash of the text is kept where it is enough, as in the splits of earlier versions.
    keys = np.where(answers[numbers] > 1, prompts, keys)
    if not labelled.any() or len(answers) < 2:
        raise DataError(
            f"{name} has no validation split, and megakd cannot cut one from its {len(rows)} "
            "row(s), because a cut needs 2 different texts (or prompts) and at least one label; "
            "add a file validation.*"
        )
    _, numbers, rows_alike = np.unique(keys, return_inverse=True, return_counts=True)
    can_be = labelled & (rows_alike[numbers] <= max(1, VALIDATION_FRACTION * len(keys)))
    held = can_be & (keys < np.uint64(int(VALIDATION_FRACTION * HASH_RANGE)))
    alike = np.isin(keys, keys[held])
    if not held.any() or alike.all():
        lowest = keys[can_be if can_be.any() else labelled].min()
        held = labelled & (keys == lowest)
        alike = np.isin(keys, keys[held])
    return np.flatnonzero(held).tolist(), np.flatnonzero(alike & ~held).tolist()


def at_most(rows: Dataset, count: int | None) -> Dataset:
    """Return the `count` rows, labelled first, with the lowest hashes, in order; None: all rows."""
    if count is None or count >= len(rows):
        return rows
    order = np.lexsort((row_keys(rows), ~is_labelled(rows)))
    return rows.select(np.sort(order[:count]))


def keep_labels(rows: Dataset, count: int | None, *, seed: int, name: str) -> Dataset:
    """Return the rows with only `count` labels, chosen by a hash of seed and text."""
    if count is None:
        return rows
    candidates = np.flatnonzero(is_labelled(rows))
    if count > candidates.size:
        raise DataError(
            f"task.labelled_examples: {count}, but the training split of {name} has "
            f"{candidates.size} labelled rows; set at most that number"
        )
    keys = row_keys(rows, salt=str(seed))[candidates]
    # Equal texts have equal keys: the earlier row is chosen first.
    kept = candidates[np.argsort(keys, kind="stable")[:count]]
    labels = column_of(rows, "label")
    fewer = np.full_like(labels, np.nan if labels.dtype.kind == "f" else IGNORE)
    fewer[kept] = labels[kept]
    # Of several labels, the column holds int8, and NumPy's format int64.
    return with_column(rows, "label", fewer if fewer.ndim == 1 else fewer.astype(np.int8))


# Increase this number when the same source results in different rows.
VERSION = 10

ROWS, NOTES = "rows.arrow", "notes.json"

ASKED = "asked"
"""Column with a hash of the prompt of a conversation, as a signed number, which Arrow infers."""

ERROR = "__error__"
"""Column of the rows of a stream: why a row cannot be read."""


def default_metrics(task: TaskType, rows: Dataset) -> tuple[str, ...]:
    """Return the official metrics of data that name none; rows may have several labels."""
    if task in LANGUAGE_TASKS:
        return ("perplexity",)
    if task == "regression":
        return ("pearson", "spearman")
    return ("f1_micro" if isinstance(rows.features["label"], List) else "accuracy",)


PAIR_DEFAULTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text", "text_pair"),
)

LABEL_DEFAULTS = {"classification": ("label", "labels"), "regression": ("label", "score", "labels")}


@dataclass(frozen=True)
class RowKind:
    """Kind of the rows of a table, and the columns that they are read from.

    fields: the columns of a conversation; or of a text or a pair with its label, or of a document.
    is_chat: whether the rows are conversations; documents beside them have no prompt.
    teacher_column, teacher: the column with the teachers of training rows, or the teacher of all.
    form: how the labels of a row with any number of them are written; None: a row has one label.
    soft_labels: the column with the probabilities of the labels of training rows, if there is one.
    """

    type: TaskType
    fields: ChatColumns
    is_chat: bool = False
    teacher_column: str | None = None
    teacher: str | None = None
    form: LabelForm | None = None
    soft_labels: str | None = None

    @staticmethod
    def from_task(task: TaskConfig, table: Table, *, as_chat: bool = False) -> RowKind:
        """Return the kind of the rows; `as_chat` makes documents conversations without a prompt."""
        if not table.columns:
            raise DataError(f"{table.name} has no rows")
        fields = chat_columns(table, task) if task.looks_for_conversations else None
        if fields is not None:
            return RowKind(task.type, fields, is_chat=True)
        label = _label_column(table, task)
        fields = ChatColumns(text=text_columns(table, task), label=label)
        form = None if label is None else label_form(table, label, task)
        return RowKind(task.type, fields, as_chat, form=form)

    def of_split(self, table: Table, split: str) -> RowKind:
        """Return the kind of another split of texts; a test split may be without labels."""
        require(table, "task.text_columns", *self.fields.text)
        label = self.fields.label
        if label is None or (split == "test" and label not in table.columns):
            return replace(self, fields=self.fields._replace(label=None))
        require(table, "task.label_column", *((self.form and self.form.columns) or (label,)))
        return self

    def taught(self, table: Table, task: TaskConfig, name: str | None = None) -> RowKind:
        """Return the kind with teachers or answers from columns, or the teacher `name`, if any."""
        column, answers = None if name else task.teacher_column, task.soft_labels
        require(table, "task.soft_labels", *filter(None, [answers]))
        require(table, "task.teacher_column", *filter(None, [column]))
        return replace(self, teacher_column=column, teacher=name, soft_labels=answers)

    @property
    def in_words(self) -> str:
        """What the rows hold, for messages."""
        if self.is_chat:
            return "conversations"
        return f"{'pairs of' if self.has_pairs else 'single'} texts"

    @property
    def has_pairs(self) -> bool:
        return self.keeps_blank and len(self.fields.text) == 2

    @property
    def is_taught(self) -> bool:
        """Whether the rows name their teachers."""
        return bool(self.teacher or self.teacher_column)

    @property
    def has_prompts_alone(self) -> bool:
        """True for conversations whose answers no column can hold."""
        return not any(self.fields._replace(prompt=None)[:4])

    @property
    def keeps_blank(self) -> bool:
        """True if rows without text are used."""
        return self.type not in LANGUAGE_TASKS

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that a conversation or a document is read from; a table may lack the last."""
        named = filter(None, (*self.fields[:3], self.fields.addition))
        return (*named, *self.fields.text, *((TOOLS, OPTIONS, FINISH) if self.is_chat else ()))

    @property
    def features(self) -> Features:
        texts = {
            "text": True,
            CONVERSATION: self.is_chat,
            "text_pair": self.has_pairs,
            ROUTE: self.is_taught,
            SOFT: self.soft_labels is not None,
            PLACE: self.is_chat or self.is_taught or self.type == "classification",
        }
        columns: dict[str, Value | List] = {n: Value("string") for n, has in texts.items() if has}
        if self.is_chat:
            columns[ASKED] = Value("int64")
        if self.keeps_blank:
            columns["label"] = Value("string" if self.type == "classification" else "float32")
        if self.form is not None:
            columns["label"] = List(Value("string"))
        return Features(columns)

    def row(self, name: str, record: Record) -> dict[str, object]:
        """Return a row of the data `name`, with the columns of `features`; see `is_blank`."""
        row: dict[str, object] = {PLACE: f"{name.rpartition('/')[2]}, {record.place}"}
        label = self.fields.label
        if self.is_chat:
            where = f"{name}, {record.place}"
            conversation = conversation_of(name, self.fields, record)
            row |= {"text": conversation.text, CONVERSATION: conversation.to_json(where)}
            number = text_hash(conversation.asked)
            row[ASKED] = number - HASH_RANGE * (number >= HASH_RANGE // 2)
        elif not self.keeps_blank:
            row["text"] = document_of(name, self.fields.text, record)
        else:
            texts = [text_of(name, column, record) for column in self.fields.text]
            row |= zip(("text", "text_pair"), texts, strict=False)
            if label is not None and self.form is not None:
                row["label"] = label_words(name, label, record, self.form)
            elif self.type == "classification":
                row["label"] = label and class_word(name, label, record)
            else:
                row["label"] = math.nan if label is None else score(name, label, record)
        if self.soft_labels is not None:
            row[SOFT] = soft_text(name, self.soft_labels, record)
        if (column := self.teacher_column) is not None:
            if (value := record.values.get(column)) in (None, ""):
                raise DataError(
                    f"{name}, {record.place}: column {column!r} (task.teacher_column) names no "
                    f"teacher (got {value!r}); write the name of one of the teachers"
                )
            row[ROUTE] = text_of(name, column, record).strip()
        elif self.teacher is not None:
            row[ROUTE] = self.teacher
        return row


def is_blank(row: Mapping[str, object]) -> bool:
    """Return whether a row, or a text of its pair, has no text."""
    return not all(str(row[name]).strip() for name in ("text", "text_pair") if name in row)


def text_columns(table: Table, task: TaskConfig) -> tuple[str, ...]:
    """Return the columns of the text, or of the two texts of a pair, of a table."""
    if task.text_columns is not None:
        require(table, "task.text_columns", *task.text_columns)
        return task.text_columns
    pairs = () if task.type in LANGUAGE_TASKS else PAIR_DEFAULTS
    for columns in (*pairs, *zip(TEXT_DEFAULTS, strict=True)):
        if all(column in table.columns for column in columns):
            return columns
    answers = (
        " or, for prompts with answers, task.prompt_column and task.completion_column, or for "
        "instructions or questions with answers task.as_messages: true"
    )
    raise DataError(
        f"{table.name}: column 'text' does not exist; the columns are {', '.join(table.columns)}"
        f"{no_header(table)}; "
        "set task.text_columns to the columns with the text"
        f"{answers if task.type == 'causal_lm' else ''}"
    )


def _label_column(table: Table, task: TaskConfig) -> str | None:
    if task.type in LANGUAGE_TASKS:
        return None
    named = task.label_column
    if isinstance(named, tuple):
        require(table, "task.label_column", *named)
        return named[0]
    usual = LABEL_DEFAULTS[task.type] if named is None else (named,)
    label = next((column for column in usual if column in table.columns), usual[0])
    if task.soft_labels is None:  # training rows may have these alone
        require(table, "task.label_column", label)
    return label


@dataclass(frozen=True, kw_only=True)
class TextStream:
    """The training rows of a run, in the order of their files, read while they are needed.

    rows: the rows of all ranks; `datasets` reads the share of each rank and says where a rank is.
        A row that cannot be read has the column `ERROR` alone.
    held_out: hashes of the validation texts, or of their prompts, which the stream leaves out.
    """

    name: str
    rows: IterableDataset
    kind: RowKind
    held_out: frozenset[int] = frozenset()
    bad: BadRows

    def read(self, rows: Iterable[Mapping[str, Any]] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows with a text that are not held out: of a share, or of all ranks."""
        for row in self.rows if rows is None else rows:
            with self.bad:
                if ERROR in row:
                    raise DataError(row[ERROR])
            if ERROR in row or is_blank(row):
                continue
            asked = row[ASKED] % HASH_RANGE if ASKED in row else text_hash(row["text"])
            if asked not in self.held_out:
                yield dict(row)


class StreamedRows(NamedTuple):
    """Training rows that are encoded while they are needed: the texts, and how to encode them."""

    texts: TextStream
    tokenizer: PreTrainedTokenizerBase
    task: TaskConfig
    packed: bool = True


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The rows of a data set before a selection; columns and stream as in `splits.Splits`.

    kind: of the training rows.
    """

    splits: Mapping[str, Dataset]
    classes: Classes | None
    source_hash: str
    kind: RowKind
    stream: TextStream | None = None


def rows_of_tables(
    tables: Mapping[str, Table],
    task: TaskConfig,
    *,
    cache_dir: Path,
) -> Corpus:
    """Return the rows of every split, in Arrow files.

    `tables` are named by their split, and the sources of a mixture `train/SOURCE`. Documents
    beside conversations, and all of a mixture, become conversations without a prompt.
    """
    order = [key for split in SPLIT_NAMES for key in tables if key.startswith(split)]
    as_chat = task.mixture is not None or (
        task.looks_for_conversations and any(chat_columns(t, task) for t in tables.values())
    )
    kinds: dict[str, RowKind] = {}
    kind: RowKind | None = None
    rows: dict[str, Dataset] = {}
    for key in order:
        split, _, source = key.partition("/")
        table = tables[key]
        if kind is None or split == "train" or as_chat:
            kind = kinds[key] = RowKind.from_task(task, table, as_chat=as_chat)
        else:
            kinds[key] = kind.of_split(table, split)
        if split == "train":  # only training rows have teachers
            teacher = (task.mixture or {})[source].teacher if source else None
            kinds[key] = kind.taught(table, task, teacher)
        rows[key] = rows_of(table, kinds[key], task, cache_dir=cache_dir, source=source or None)
    classes, first = None, order[0]
    kind = kinds[first]
    label = kind.fields.label
    if label is not None and task.type == "classification":
        form, declared = kind.form, tables[first].class_names.get(label, ())
        names = task.labels or (form and form.columns) or declared
        has_lists = task.multi_label is None
        name = tables[first].name
        classes = find_classes(rows[first], label, names, name=name, has_lists=has_lists)
        rows = {split: numbered(rows[split], classes, task, kinds[split]) for split in rows}
    train = concatenate_datasets([rows.pop(key) for key in order if key.startswith("train")])
    digests = [(key, tables[key].digest, vars(kind)) for key, kind in kinds.items()]
    return Corpus(
        splits={"train": train, **rows},
        classes=classes,
        kind=kind,
        source_hash=key_of(VERSION, task.type, classes and classes.names, digests),
    )


def numbered(rows: Dataset, classes: Classes, task: TaskConfig, kind: RowKind) -> Dataset:
    """Return rows with class numbers as labels."""
    rows = with_numbers(rows, classes, bad=BadRows(task.bad_rows))
    if kind.soft_labels is not None:
        rows = with_soft_labels(rows, classes.names, bad=BadRows(task.bad_rows))
    return rows if kind.is_taught else rows.remove_columns(PLACE)


def rows_of(
    table: Table, kind: RowKind, task: TaskConfig, *, cache_dir: Path, source: str | None = None
) -> Dataset:
    """Return the rows of a table, memory-mapped; they are written when they are first asked for.

    The source of a mixture gives them a column `source`.
    """
    # Messages name the file.
    where = (Path(table.name).name, source)
    key = key_of(VERSION, table.digest, vars(kind), where, task.bad_rows)

    def fill(fresh: Path) -> None:
        bad, blank, unlabelled = BadRows(task.bad_rows), list[str](), Counter[str]()
        rows = _rows(table, kind, bad, blank, unlabelled)
        features = kind.features
        if source is not None:
            rows = ({SOURCE: source, **row} for row in rows)
            features = Features(features | {SOURCE: Value("string")})
        write_tables(fresh / ROWS, tables_of_rows(rows, features))
        bad.finish()
        count = len(read_rows(fresh / ROWS))
        if count == 0:
            raise DataError(f"{table.name} has no rows{' with text' if blank or bad.count else ''}")
        if kind.keeps_blank and len(blank) == count:
            raise DataError(
                f"{table.name}: all {count} rows have an empty text; check task.text_columns"
            )
        notes = [*_notes(count, bad.count, blank, unlabelled, are_kept=kind.keeps_blank)]
        (fresh / NOTES).write_text(json.dumps(notes), encoding="utf-8")

    folder = whole_folder(cache_dir / "rows" / key[:32], fill)
    for level, text, *values in json.loads((folder / NOTES).read_text(encoding="utf-8")):
        logger.log(level, text, table.name, *values)
    return read_rows(folder / ROWS)


def _notes(
    count: int, bad: int, blank: Sequence[str], unlabelled: Counter[str], *, are_kept: bool
) -> Iterator[tuple[object, ...]]:
    # What is unusual: level, text, and its values after the name of the table.
    if bad:
        yield logging.WARNING, "%s: %d bad row(s) left out (task.bad_rows: drop)", bad
    if unlabelled:
        # An empty cell is meant; a word such as nan may be the name of a class.
        words = [f"{n} say {word!r}" for word, n in unlabelled.most_common() if word.isalpha()]
        also = ", which means no label; a class needs another name"
        told = f" ({', '.join(words)}{also})" if words else ""
        level = logging.WARNING if words else logging.INFO
        yield level, "%s: %d of %d rows have no label%s", unlabelled.total(), count, told
    if blank:
        line = "%s: %d row(s) with an empty text, the first is %s; such rows are %s"
        use = "used as they are" if are_kept else "left out"
        yield logging.WARNING, line, len(blank), blank[0], use


def _rows(
    table: Table, kind: RowKind, bad: BadRows, blank: list[str], unlabelled: Counter[str]
) -> Iterator[dict[str, object]]:
    # `blank` gets the places of the rows without text, `unlabelled` what is in place of labels.
    for record in table.records():
        with bad:
            if isinstance(record, DataError):
                raise record
            row = kind.row(table.name, record)
            if is_blank(row):
                blank.append(record.place)
                if not kind.keeps_blank:
                    continue
            # A row without a score has NaN, which differs from itself.
            label = kind.fields.label
            if label and (row["label"] is None or row["label"] != row["label"]):
                cell = record.values.get(label)
                unlabelled[cell.strip() if isinstance(cell, str) else ""] += 1
            yield row


def scored_rows(
    table: Table, kind: RowKind, task: TaskConfig, classes: Classes | None, *, cache_dir: Path
) -> Dataset:
    """Return the rows of a file that is scored alone, neither trained on nor selected by."""
    rows = rows_of(table, kind, task, cache_dir=cache_dir)
    if classes is not None:
        rows = numbered(rows, classes, task, kind)
    if not is_labelled(rows).any():
        raise DataError(f"{table.name} has no labelled rows to score")
    return rows


def without_teachers(rows: Dataset) -> Dataset:
    """Return rows without the columns of their teachers, such as held-out rows."""
    # Conversations have places of their own.
    gone = {ROUTE, SOFT} if CONVERSATION in rows.column_names else {ROUTE, SOFT, PLACE}
    return rows.remove_columns([name for name in rows.column_names if name in gone])


def check_row_teachers(rows: Dataset, teachers: Sequence[str]) -> None:
    """Check that the training rows name all teachers and no other, and log their numbers."""
    names = column_of(rows, ROUTE)
    counts = Counter(names.tolist())
    for name in (name for name in counts if name not in teachers):
        row = int(np.flatnonzero(names == name)[0])
        raise DataError(
            f'{rows[row][PLACE]}: there is no teacher "{name}"{suggestion(name, teachers)} '
            f"(known: {', '.join(teachers)}; {counts[name]} row(s) name it)"
        )
    if unused := [name for name in teachers if name not in counts]:
        raise DataError(
            f"teachers: no training row names {' or '.join(unused)} (the rows name "
            f"{', '.join(counts)}); remove the teacher from the list, or check task.teacher_column"
        )
    parts = (f"{n}: {counts[n]} ({counts[n] / len(rows):.1%})" for n in teachers)
    logger.info("training rows by teacher: %s", ", ".join(parts))
