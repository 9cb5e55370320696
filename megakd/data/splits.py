"""The rows of a run: training and held-out rows are selected, and what was read is reported."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from datasets.fingerprint import generate_fingerprint

from megakd.config.paths import expand_path, looks_like_path
from megakd.config.task import TaskConfig
from megakd.data.arrow import column_of, key_of, remembered
from megakd.data.files import local_tables, matching_files, named_files, refuse_twice
from megakd.data.readers import files_table
from megakd.data.records import Table
from megakd.data.rows import (
    Corpus,
    RowKind,
    TextStream,
    at_most,
    cut_validation,
    default_metrics,
    is_labelled,
    keep_labels,
    prompt_keys,
    rows_of_tables,
    scored_rows,
    without_teachers,
)
from megakd.errors import ConfigError, DataError, listed

logger = logging.getLogger(__name__)

MOST_CUT_ROWS = 5000
"""Rows that are scored at most of a validation split that is cut from the training rows: 5 % of a
large corpus would take longer to score than the training between two evaluations."""


class Splits(NamedTuple):
    """The rows of a run.

    train, validation, test: columns `text`, `text_pair` (pairs only) and `label`. The label is an
        int64 class number or a float32 score, and -100 or NaN for a row without a label; or int8
        numbers by class, 1 for each label of the row, else 0, or all -100. mlm and
        causal_lm have no column `label`, and conversations have those of `conversations`.
        test is None unless its rows carry labels.
    label_names: class names in the order of their numbers; empty without classes.
    content_hash: sha256 of the sources of all rows and of their selection.
    kind: of the training rows; all other rows have the same columns of text.
    evaluation_sets: further rows to score, by name; always with labels.
    is_cut: whether the validation rows were cut from the training rows.
    stream: the training texts with `task.streaming`; `train` is then empty.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    content_hash: str
    kind: RowKind
    evaluation_sets: Mapping[str, Dataset] = MappingProxyType({})
    is_cut: bool = False
    stream: TextStream | None = None

    @property
    def multi_label(self) -> bool:
        """Whether a row has any number of labels."""
        return self.kind.form is not None

    @property
    def held_out(self) -> Dataset:
        """The split that the report's metrics are computed on."""
        return self.validation if self.test is None else self.test


def load_splits(task: TaskConfig, *, seed: int, cache_dir: Path) -> Splits:
    """Return the rows of the task's data, with the labels and held-out rows that the task keeps.

    The seed chooses the labels of `task.labelled_examples` alone.
    """
    # Missing files are found before the training rows are read.
    sets: dict[str, Table] = {}
    for name, files in task.evaluation_sets.items():
        key = f"task.evaluation_sets.{name}"
        sets[name] = files_table(matching_files(files, key), key)
    corpus, metrics = _read(task, cache_dir)
    data = task.data_name if task.mixture is None else "task.mixture"
    scored = {name: _set_rows(name, table, task, corpus, cache_dir) for name, table in sets.items()}
    train, validation = corpus.splits["train"], corpus.splits.get("validation")
    most, is_cut = task.max_eval_examples, validation is None
    if validation is None:
        train, validation = cut_validation(train, name=data)
    if not is_labelled(validation).any():
        raise DataError(f"the validation split of {data} has no labelled rows to score")
    test = corpus.splits.get("test")
    if test is not None and not is_labelled(test).any():
        test = None
    most_scored = MOST_CUT_ROWS if is_cut and most is None else most
    if most_scored != most and len(validation) > MOST_CUT_ROWS:
        logger.info(
            "validation: %d of the %d rows that are held out are scored; task.max_eval_examples "
            "sets another number",
            *(MOST_CUT_ROWS, len(validation)),
        )
    chosen = task.labelled_examples, task.labelled_examples and seed, most
    digests = {name: table.digest for name, table in sets.items()}
    return Splits(
        train=keep_labels(train, task.labelled_examples, seed=seed, name=data),
        validation=at_most(without_teachers(validation), most_scored),
        test=None if test is None else at_most(test, most),
        label_names=corpus.classes.names if corpus.classes else (),
        metrics=metrics or default_metrics(task.type, train),
        content_hash=key_of(corpus.source_hash, chosen, digests),
        kind=corpus.kind,
        evaluation_sets=scored,
        is_cut=is_cut,
        stream=corpus.stream,
    )


def _set_rows(
    name: str, table: Table, task: TaskConfig, corpus: Corpus, cache_dir: Path
) -> Dataset:
    kind = replace(
        RowKind.from_task(task, table, as_chat=corpus.kind.is_chat), form=corpus.kind.form
    )
    rows = scored_rows(table, kind, task, corpus.classes, cache_dir=cache_dir)
    mine, theirs = kind.in_words, corpus.kind.in_words
    if mine != theirs:
        raise DataError(
            f"task.evaluation_sets.{name}: {table.name} holds {mine}, and the training rows are "
            f"{theirs}; set task.text_columns to the text columns"
        )
    return rows


def _read(task: TaskConfig, cache_dir: Path) -> tuple[Corpus, tuple[str, ...] | None]:
    # A run imports the reader of its own source alone.
    metrics = None
    if (task.dataset or "").startswith("glue/"):
        from megakd.data.hub import glue_task

        task, metrics = glue_task(task)
    is_on_hub = _is_on_hub(task)
    if task.streaming:
        from megakd.data.streams import streamed_files, streamed_hub_rows

        return (streamed_hub_rows if is_on_hub else streamed_files)(task, cache_dir=cache_dir), None
    if is_on_hub:
        from megakd.data.hub import hub_tables

        tables = hub_tables(task)
    else:
        tables = local_tables(task) if task.mixture is None else mixture_tables(task)
    return rows_of_tables(tables, task, cache_dir=cache_dir), metrics


def mixture_tables(task: TaskConfig) -> dict[str, Table]:
    """Return the rows of all sources of `task.mixture`, and of the validation and test files."""
    tables: dict[str, Table] = {}
    paths = {f"task.{split}_files": files for split, files in named_files(task).items()}
    for name, source in (task.mixture or {}).items():
        key = f"task.mixture.{name}.files"
        if source.files is not None:
            paths[key] = matching_files(source.files, key)
            tables[f"train/{name}"] = files_table(paths[key], key)
        else:
            from megakd.data.hub import hub_tables

            of_hub = replace(
                task,
                dataset=source.dataset,
                dataset_config=source.dataset_config,
                revision=source.revision,
                splits={"train": source.split},
            )
            tables[f"train/{name}"] = hub_tables(of_hub)["train"]
    refuse_twice(paths)
    for split in ("validation", "test"):
        if files := paths.get(key := f"task.{split}_files"):
            tables[split] = files_table(files, key)
    return tables


def _is_on_hub(task: TaskConfig) -> bool:
    """Return whether `datasets` reads the data: of the Hub, or of a folder that is laid out so."""
    if task.dataset is None:
        return False
    path = expand_path(task.dataset)
    if not path.exists() and not looks_like_path(task.dataset):
        return True
    from megakd.data.hub import is_hub_folder

    is_chosen = task.dataset_config is not None or task.splits is not None
    is_folder = path.is_dir() and (is_chosen or is_hub_folder(path))
    for key in ("revision",) if is_folder else ("dataset_config", "revision", "splits"):
        if (value := getattr(task, key)) is not None:
            raise ConfigError(
                f"task.{key}: {value!r} is for a data set of the Hub, but task.dataset "
                f"{task.dataset!r} is a local path; remove the key"
            )
    return is_folder


SEPARATORS = (",", ";", "|")

NO_LABEL = frozenset(("n/a", "na", "none", "null", "nan", "nil", "-", "?", "unknown", "undefined"))
"""Words that may stand for a missing label, in lower case."""


def read_line(splits: Splits) -> str:
    """Return the sizes of the splits: `train 3000 rows, 64 classes of 13 to 64 rows; …`."""
    if splits.stream is not None:
        parts = ["train: a stream"]
    else:
        rows, labelled = len(splits.train), int(is_labelled(splits.train).sum())
        parts = [f"train {rows:,} rows" + (f", {labelled:,} labelled" if labelled < rows else "")]
        counts = _counts(splits.train, len(splits.label_names))
        if counts:
            parts[0] += f", {len(counts)} classes of {min(counts):,} to {max(counts):,} rows"
        if counts and splits.multi_label:
            parts[0] += f", {sum(counts) / max(1, labelled):.2f} labels a row"
    for name, rows in (("validation", splits.validation), ("test", splits.test)):
        if rows is not None:
            parts.append(f"{name} {len(rows):,}")
    return "; ".join(parts)


def read_warnings(splits: Splits, *, step_rows: int) -> Iterator[str]:
    """Yield warnings on labels and rows, each with counts; `step_rows`: rows of a step."""
    names = splits.label_names
    if names and splits.stream is None:
        counts = _counts(splits.train, len(names))
        yield from _of_labels(names, counts, is_list=splits.multi_label)
    if splits.stream is None and 0 < len(splits.train) < step_rows:
        yield (
            f"the {len(splits.train)} training rows are fewer than the {step_rows} of a step, "
            "which has these alone; lower train.per_device_train_batch_size"
        )
    train, held_out = splits.train, splits.held_out
    if len(train) == 0 or (splits.is_cut and splits.test is None):
        return  # a cut leaves no text and no prompt on both sides

    def count() -> int:
        return int(np.isin(prompt_keys(held_out), prompt_keys(train)).sum())

    again = remembered(count, "again", *map(generate_fingerprint, (train, held_out)))
    if again:
        yield (
            f"{again:,} of the {len(held_out):,} held-out rows are training rows too, so the "
            "scores are too good; remove them from one of the two"
        )


def _of_labels(names: Sequence[str], counts: Sequence[int], *, is_list: bool) -> Iterator[str]:
    rows = dict(zip(names, counts, strict=True))
    alike = defaultdict[str, list[str]](list)
    for name in names:
        alike[" ".join(name.casefold().replace("_", " ").split())].append(name)
    for same in (same for same in alike.values() if len(same) > 1):
        yield f"the classes {_shown(same, rows)} differ only in case or spaces; is this one class?"
    missing = [name for name in names if name.strip().casefold() in NO_LABEL]
    if missing:
        yield f"the class {_shown(missing, rows)}: if it stands for no label, empty its cells"
    joined = [
        name
        for name in names
        for parts in (name.split(separator) for separator in SEPARATORS)
        if len(parts) > 1 and all(part.strip() in rows for part in parts)
    ]
    if joined:
        yield (
            f"{len(joined)} classes are several others in one cell: {_shown(joined, rows)}; "
            "each combination is learned as a class of its own; "
            f"{'split' if is_list else 'set task.label_separator to split'} them into labels"
        )
    unused = [name for name in names if any(counts) and rows[name] == 0]
    if unused:
        yield (
            f"{len(unused)} classes have no training row: {_shown(unused, rows)}; the model never "
            "learns them: check the names in task.labels, or add rows"
        )
    single = [name for name in names if rows[name] == 1]
    if single:
        yield (
            f"{len(single)} classes have one training row: {_shown(single, rows)}; give them more "
            "rows, or join them"
        )


def _shown(names: Sequence[str], rows: dict[str, int]) -> str:
    return listed([f'"{name}" ({rows[name]:,} rows)' for name in names])


def _counts(rows: Dataset, classes: int) -> list[int]:
    if not classes or "label" not in rows.column_names:
        return []
    labels = column_of(rows, "label")
    if labels.ndim == 2:
        return (labels == 1).sum(axis=0).tolist()
    return np.bincount(labels[labels >= 0], minlength=classes).tolist()
