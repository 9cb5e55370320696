"""The rows of tables: written to Arrow files once, or read from a stream while they are needed."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, ROUTE
from megakd.data.arrow import (
    PLACE,
    SPLIT_NAMES,
    BadRows,
    SplitName,
    Table,
    column_of,
    key_of,
    read_rows,
    write_rows,
)
from megakd.data.chat.conversations import CONVERSATION, SOURCE, Conversation, chat_columns, is_chat
from megakd.data.choosing import is_labelled, text_hash
from megakd.data.labels import Classes, RowKind, find_classes, is_blank, place_of, row_teacher
from megakd.errors import DataError, suggestion
from megakd.storage.folders import whole_folder

logger = logging.getLogger(__name__)
# Increase this number when the same source results in different rows.
VERSION = 5
# Increase this number when a folder of rows gets different files or rows.
LAYOUT = 4
BLANK_FILE = "blank_rows.json"
"""File in a folder of rows: the number of rows without text, the first, the bad rows, and what the
rows without a label have in its place, with their numbers."""
ERROR = "__error__"
"""Column of the rows of a stream: why a row cannot be read."""
DEFAULT_METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "mlm": ("perplexity",),
    "causal_lm": ("perplexity",),
}


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
    bad: BadRows = field(default_factory=lambda: BadRows(named=1))

    def read(self, rows: Iterable[Mapping[str, str]] | None = None) -> Iterator[dict[str, str]]:
        """Yield the rows with a text that are not held out: of a share, or of all ranks."""
        for row in self.rows if rows is None else rows:
            with self.bad:
                if ERROR in row:
                    raise DataError(row[ERROR])
            if ERROR in row or is_blank(row):
                continue
            chat = row.get(CONVERSATION)
            asked = Conversation.from_json(chat).asked if chat else row["text"]
            if text_hash(asked) not in self.held_out:
                yield dict(row)


class StreamedRows(NamedTuple):
    """Training rows that are encoded while they are needed: the texts, and how to encode them."""

    texts: TextStream
    tokenizer: PreTrainedTokenizerBase
    task: TaskConfig
    packed: bool = True


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The rows of a data set before a selection; columns and stream as in `splits.Splits`."""

    name: str
    splits: Mapping[SplitName, Dataset]
    classes: Classes | None
    metrics: tuple[str, ...]
    source_hash: str
    stream: TextStream | None = None


def rows_of_tables(
    tables: Mapping[SplitName, Table],
    task: TaskConfig,
    *,
    name: str,
    cache_dir: Path,
    metrics: tuple[str, ...] | None = None,
) -> Corpus:
    """Return the rows of every split, in Arrow files."""
    for table in tables.values():
        _require_rows(table)
    tables = {split: tables[split] for split in SPLIT_NAMES if split in tables}
    kinds: dict[SplitName, RowKind]
    if any(chat_columns(table, task) for table in tables.values()):
        kinds = {split: RowKind.of(task, table, as_chat=True) for split, table in tables.items()}
    else:
        train = RowKind.of(task, tables["train"])
        if train.label is not None and task.type == "classification":
            named = find_classes(tables["train"], train.label, text=train.fields.text)
            train = replace(train, classes=named)
        kinds = {split: train.of_split(table, split) for split, table in tables.items()}
    # Only training rows have teachers.
    teacher = row_teacher(tables["train"], task.teacher_column)
    kinds["train"] = replace(kinds["train"], teacher=teacher)
    return Corpus(
        name=name,
        splits={s: rows_of(t, kinds[s], task, cache_dir=cache_dir) for s, t in tables.items()},
        classes=kinds["train"].classes,
        metrics=metrics or DEFAULT_METRICS[task.type],
        source_hash=_source_hash(tables, kinds),
    )


def _source_hash(tables: Mapping[SplitName, Table], kinds: Mapping[SplitName, RowKind]) -> str:
    # Runs that earlier versions began know these hashes.
    train = kinds["train"]
    if train.is_chat:
        parts = [(split, tables[split].digest, kinds[split].fields) for split in sorted(tables)]
        return key_of("chat", parts, *([train.teacher.column] if train.teacher else ()))
    digests: list[object] = [VERSION, train.type, train.classes.names if train.classes else None]
    for split, table in tables.items():
        digests.append((split, table.digest, kinds[split].fields, *(kinds[split].teacher or ())))
    return key_of(digests)


def rows_of(
    table: Table, kind: RowKind, task: TaskConfig, *, cache_dir: Path, source: str | None = None
) -> Dataset:
    """Return the rows of a table, memory-mapped; they are written when they are first asked for.

    The source of a mixture gives them a column `source`.
    """
    classes = kind.classes and (kind.classes.names, kind.classes.numbered)
    read = (kind.type, kind.is_chat, kind.fields, classes)
    # Messages name the file.
    where = (Path(table.name).name, source, kind.teacher)
    content = (table.digest, table.format)
    key = key_of(VERSION, LAYOUT, content, read, where, task.bad_rows)

    def fill(fresh: Path) -> None:
        blank: dict[str, Any] = {"count": 0, "first": "", "unlabelled": Counter[str]()}
        bad = BadRows(task.bad_rows)
        more = {} if source is None else {SOURCE: Value("string")}
        rows = _rows(table, kind, source, blank=blank, bad=bad)
        write_rows(rows, Features(kind.features | more), fresh / "rows.arrow")
        bad.finish()
        text = json.dumps({**blank, "bad": bad.count})
        (fresh / BLANK_FILE).write_text(text, encoding="utf-8")

    folder = whole_folder(cache_dir / "rows" / key[:32], fill)
    rows = read_rows(folder / "rows.arrow")
    if len(rows) == 0:
        raise DataError(f"{table.name} has no rows with text")
    _tell_blank(folder, table.name, count=len(rows), are_kept=kind.keeps_blank)
    return rows


def _rows(
    table: Table, kind: RowKind, source: str | None, *, blank: dict[str, Any], bad: BadRows
) -> Iterator[dict[str, object]]:
    for record in table.records():
        with bad:
            row = kind.row(table, record)
            if is_blank(row):
                blank["count"] += 1
                blank["first"] = blank["first"] or record.place
                if not kind.keeps_blank:
                    continue
            label = cast("float", row.get("label", 0))
            # A score may be -100.
            if kind.label and (label == IGNORE if kind.classes else math.isnan(label)):
                cell = record.values.get(kind.label)
                blank["unlabelled"][cell.strip() if isinstance(cell, str) else ""] += 1
            if source is not None:
                row[SOURCE] = source
            if kind.teacher is not None:
                row |= {ROUTE: kind.teacher.of(table, record), PLACE: place_of(table, record)}
            yield row


def _tell_blank(folder: Path, name: str, *, count: int, are_kept: bool) -> None:
    there = json.loads((folder / BLANK_FILE).read_text(encoding="utf-8"))
    if there.get("bad"):
        logger.warning("%s: %d bad row(s) left out (task.bad_rows: drop)", name, there["bad"])
    if cells := Counter[str](there["unlabelled"]):
        # An empty cell is meant; a word such as nan may be the name of a class.
        words = ", ".join(f"{n} say {word!r}" for word, n in cells.most_common() if word.isalpha())
        level = logging.WARNING if words else logging.INFO
        also = f" ({words}, which means no label; a class needs another name)" if words else ""
        logger.log(level, "%s: %d of %d rows have no label%s", name, cells.total(), count, also)
    if are_kept and there["count"] == count:
        raise DataError(f"{name}: all {count} rows have an empty text; check task.text_columns")
    if there["count"]:
        logger.warning(
            "%s: %d row(s) with an empty text, the first is %s; such rows are %s",
            *(name, there["count"], there["first"]),
            "used as they are" if are_kept else "left out",
        )


def scored_rows(
    table: Table,
    task: TaskConfig,
    classes: Classes | None,
    *,
    cache_dir: Path,
    as_chat: bool = False,
) -> Dataset:
    """Return the rows of a file that is scored alone, neither trained on nor selected by."""
    _require_rows(table)
    kind = RowKind.of(task, table, classes, as_chat=as_chat)
    rows = rows_of(table, kind, task, cache_dir=cache_dir)
    if not is_labelled(rows).any():
        raise DataError(f"{table.name} has no labelled rows to score")
    return rows


def _require_rows(table: Table) -> None:
    if next(table.records(), None) is None:
        raise DataError(f"{table.name} has no rows")


def without_teachers(rows: Dataset) -> Dataset:
    """Return rows without the columns of their teachers, such as held-out rows."""
    gone = {ROUTE} if is_chat(rows) else {ROUTE, PLACE}  # conversations have places of their own
    return rows.remove_columns([name for name in rows.column_names if name in gone])


def check_row_teachers(rows: Dataset, teachers: Sequence[str]) -> None:
    """Check that the training rows name all teachers and no other, and log their numbers."""
    names = column_of(rows, ROUTE)
    counts = Counter(names.tolist())
    for name in counts:
        if name not in teachers:
            row = int(np.flatnonzero(names == name)[0])
            raise DataError(
                f'{rows[row][PLACE]}: there is no teacher "{name}"{suggestion(name, teachers)} '
                f"(known: {', '.join(teachers)}; {counts[name]} row(s) name it)"
            )
    unused = [name for name in teachers if name not in counts]
    if unused:
        raise DataError(
            f"teachers: no training row names {' or '.join(unused)} (the rows name "
            f"{', '.join(counts)}); remove the teacher from the list, or check task.teacher_column"
        )
    parts = (f"{n}: {counts[n]} ({counts[n] / len(rows):.1%})" for n in teachers)
    logger.info("training rows by teacher: %s", ", ".join(parts))
