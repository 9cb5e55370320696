"""The rows of a run: `load_splits` loads the data set and selects training and held-out rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from datasets import Dataset, List

from megakd.config.paths import looks_like_path
from megakd.config.task import TaskConfig
from megakd.data.arrow import Table, key_of
from megakd.data.chat.conversations import is_chat
from megakd.data.choosing import at_most, cut_validation, is_labelled, keep_labels
from megakd.data.files import local_rows, matching_files, named_files, refuse_twice
from megakd.data.readers import files_table
from megakd.data.rows import Corpus, TextStream, rows_of_tables, scored_rows, without_teachers
from megakd.errors import ConfigError, DataError
from megakd.process.terminal import in_home

logger = logging.getLogger(__name__)
MOST_CUT_ROWS = 5000
"""Rows that are scored at most of a validation split that is cut from the training rows: 5 % of a
large corpus would take longer to score than the training between two evaluations."""


class Splits(NamedTuple):
    """The rows of a run.

    train, validation, test: columns `text`, `text_pair` (pairs only) and `label`. The label is an
        int64 class number or a float32 score, and -100 or NaN for a row without a label; or int8
        numbers by class, 1 for each label of the row, else 0, or all -100. mlm and
        causal_lm have no column `label`, and conversations have those of `chat.conversations`.
        test is None unless its rows carry labels.
    label_names: class names in the order of their numbers; empty without classes.
    content_hash: sha256 of the sources of all rows and of their selection.
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
    evaluation_sets: Mapping[str, Dataset] = MappingProxyType({})
    is_cut: bool = False
    stream: TextStream | None = None

    @property
    def multi_label(self) -> bool:
        """Whether a row has any number of labels."""
        return isinstance(self.train.features.get("label"), List)

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
    corpus = _find(task, cache_dir)
    scored = {name: _set_rows(name, table, task, corpus, cache_dir) for name, table in sets.items()}
    train, validation = corpus.splits["train"], corpus.splits.get("validation")
    most, is_cut = task.max_eval_examples, validation is None
    if validation is None:
        train, validation = cut_validation(train, name=corpus.name)
    if not is_labelled(validation).any():
        raise DataError(f"the validation split of {corpus.name} has no labelled rows to score")
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
        train=keep_labels(train, task.labelled_examples, seed=seed, name=corpus.name),
        validation=at_most(without_teachers(validation), most_scored),
        test=None if test is None else at_most(test, most),
        label_names=corpus.classes.names if corpus.classes else (),
        metrics=corpus.metrics,
        content_hash=key_of(corpus.source_hash, chosen, digests),
        evaluation_sets=scored,
        is_cut=is_cut,
        stream=corpus.stream,
    )


def _set_rows(
    name: str, table: Table, task: TaskConfig, corpus: Corpus, cache_dir: Path
) -> Dataset:
    train = corpus.splits["train"]
    rows = scored_rows(table, task, corpus.classes, cache_dir=cache_dir, as_chat=is_chat(train))
    mine, theirs = (
        "conversations"
        if is_chat(part)
        else f"{'pairs of' if 'text_pair' in part.column_names else 'single'} texts"
        for part in (rows, train)
    )
    if mine != theirs:
        raise DataError(
            f"task.evaluation_sets.{name}: {table.name} holds {mine}, and the training rows are "
            f"{theirs}; set task.text_columns to the text columns"
        )
    return rows


def _find(task: TaskConfig, cache_dir: Path) -> Corpus:
    # A run imports the reader of its own source alone.
    if task.mixture is not None:
        find = mixture_rows
    elif (task.dataset or "").startswith("glue/"):
        from megakd.data.hub import glue_rows as find
    elif _is_on_hub(task) and task.streaming:
        from megakd.data.streams import streamed_hub_rows as find
    elif _is_on_hub(task):
        from megakd.data.hub import hub_rows as find
    elif task.streaming:
        from megakd.data.streams import streamed_files as find
    else:
        find = local_rows
    return find(task, cache_dir=cache_dir)


def mixture_rows(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return the rows of all sources of `task.mixture`, and of the validation and test files."""
    tables: dict[str, Table] = {}
    paths = {f"task.{split}_files": files for split, files in named_files(task).items()}
    for name, source in (task.mixture or {}).items():
        key = f"task.mixture.{name}.files"
        if source.files is not None:
            paths[key] = matching_files(source.files, key)
            tables[f"train/{name}"] = files_table(paths[key], key)
        else:
            from megakd.data.hub import hub_source

            tables[f"train/{name}"] = hub_source(source)
    refuse_twice(paths)
    for split in ("validation", "test"):
        if files := paths.get(key := f"task.{split}_files"):
            tables[split] = files_table(files, key)
    return rows_of_tables(tables, task, name="task.mixture", cache_dir=cache_dir)


def _is_on_hub(task: TaskConfig) -> bool:
    if task.dataset is None:
        return False
    is_local = in_home(task.dataset).exists() or looks_like_path(task.dataset)
    for key in ("dataset_config", "revision", "splits"):
        if is_local and (value := getattr(task, key)) is not None:
            raise ConfigError(
                f"task.{key}: {value!r} is for a data set of the Hub, but task.dataset "
                f"{task.dataset!r} is a local path; remove the key"
            )
    return not is_local
