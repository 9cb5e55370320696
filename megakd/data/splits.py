"""The one way to rows: `load_splits` finds the data set and chooses what is trained and scored."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from megakd.config import LANGUAGE_TASKS, TaskConfig
from megakd.data.cache import key_of
from megakd.data.choosing import at_most, cut_validation, is_labelled, keep_labels
from megakd.data.files import local_rows, looks_like_path
from megakd.data.glue import glue_rows
from megakd.data.hub import hub_rows
from megakd.data.pydocs import pydocs_rows
from megakd.data.tables import Found
from megakd.errors import ConfigError, DataError


class Splits(NamedTuple):
    """The rows of a run.

    train, validation, test: columns `text`, `text_pair` (pairs only) and `label`, an int64 class
        number or a float32 score, absent for mlm and causal_lm; -100 or NaN where a row has no
        label. test is None unless its rows carry labels.
    label_names: class names in the order of their numbers; empty without classes.
    metrics: names of the official metrics.
    content_hash: sha256 of what the rows came from and of how they were chosen.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    content_hash: str


def load_splits(task: TaskConfig, *, seed: int, cache_dir: Path) -> Splits:
    """The rows of `task.dataset`, with as many labels and held-out rows as the task keeps.

    Args:
        task: says which data, which columns, how many labels.
        seed: of the run; chooses whose labels `task.labelled_examples` keeps, nothing else.
        cache_dir: rows read once are kept in it.

    Raises:
        DataError: a file, column, label or the Hub cannot be used.
        ConfigError: keys of the task do not fit each other.
    """
    if task.type in LANGUAGE_TASKS and task.labelled_examples is not None:
        raise ConfigError(f"task.labelled_examples: {task.type} has no labels; leave this key out")
    found = _find(task, cache_dir)
    train, validation = found.splits["train"], found.splits.get("validation")
    if validation is None:
        train, validation = cut_validation(train, name=found.name)
    if not is_labelled(validation).any():
        raise DataError(f"the validation split of {found.name} has no labelled rows to score")
    test = found.splits.get("test")
    if test is not None and not is_labelled(test).any():
        test = None
    return Splits(
        train=keep_labels(train, task.labelled_examples, seed=seed, name=found.name),
        validation=at_most(validation, task.max_eval_examples),
        test=None if test is None else at_most(test, task.max_eval_examples),
        label_names=found.label_names,
        metrics=found.metrics,
        content_hash=_content_hash(found, task, seed),
    )


def _find(task: TaskConfig, cache_dir: Path) -> Found:
    if task.dataset == "pydocs":
        return pydocs_rows(task, cache_dir=cache_dir)
    if task.dataset.startswith("glue/"):
        return glue_rows(task, cache_dir=cache_dir)
    if task.data_dir is not None:
        raise ConfigError(
            f"task.data_dir: {task.data_dir} is only read for glue/<task>; "
            f"task.dataset {task.dataset!r} names its own file, folder or Hub id"
        )
    path = Path(task.dataset).expanduser()
    if path.exists() or looks_like_path(task.dataset):
        if task.dataset_config is not None:
            raise ConfigError(
                f"task.dataset_config: {task.dataset_config!r} names a configuration on the Hub, "
                f"but task.dataset {task.dataset!r} is a local path; leave this key out"
            )
        return local_rows(path, task, cache_dir=cache_dir)
    return hub_rows(task, cache_dir=cache_dir)


def _content_hash(found: Found, task: TaskConfig, seed: int) -> str:
    if task.labelled_examples is None and task.max_eval_examples is None:
        return found.source_hash
    chosen_by = seed if task.labelled_examples is not None else None
    return key_of(found.source_hash, task.labelled_examples, chosen_by, task.max_eval_examples)
