"""Data sets of the Hugging Face Hub, GLUE among them, loaded with `datasets` and its cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from megakd.config.task import MixtureSource, TaskConfig
from megakd.data.arrow import SPLIT_ALIASES, SplitName, Table, rows_key
from megakd.data.readers import typed_table
from megakd.data.rows import Corpus, rows_of_tables
from megakd.errors import ConfigError, DataError, first_line, suggestion


def hub_rows(
    task: TaskConfig, *, cache_dir: Path, metrics: tuple[str, ...] | None = None
) -> Corpus:
    """Return the rows of the splits of the Hub data set `task.dataset`."""
    name = task.data_name
    load = partial(datasets.load_dataset, name, name=task.dataset_config, revision=task.revision)
    with hub_errors(name, task.dataset_config) as label:
        if task.splits is None:
            loaded = cast("Mapping[str, Dataset]", load())
            splits = splits_of([*loaded], label)
        else:
            splits = task.splits
            loaded = {key: cast("Dataset", load(split=key)) for key in splits.values()}
    tables: dict[str, Table] = {
        split: typed_table(f"{name} ({key})", loaded[key], digest=rows_key(loaded[key]))
        for split, key in splits.items()
    }
    return rows_of_tables(tables, task, name=name, cache_dir=cache_dir, metrics=metrics)


def hub_source(source: MixtureSource) -> Table:
    """Return the rows of a source of a mixture that is a data set of the Hub."""
    name = source.dataset or ""
    with hub_errors(name, source.dataset_config):
        loaded = datasets.load_dataset(
            name, name=source.dataset_config, split=source.split, revision=source.revision
        )
    rows = cast("Dataset", loaded)
    return typed_table(f"{name} ({source.split})", rows, digest=rows_key(rows))


def splits_of(names: list[str], label: str) -> dict[SplitName, str]:
    """Return the name of every split among the names that a Hub data set has."""
    splits: dict[SplitName, str] = {}
    for name in names:
        split = SPLIT_ALIASES.get(name.lower())
        if split is not None and splits.setdefault(split, name) != name:
            raise DataError(
                f"the Hub data set {label}: {splits[split]!r} and {name!r} are names of the same "
                f"split ({split}); name the one to use in task.splits"
            )
    if "train" not in splits:
        raise DataError(
            f"the Hub data set {label} has no split named 'train'; its splits are "
            f"{', '.join(names)}: name those to use, as in task.splits: {{train: {names[0]}}}"
        )
    return splits


@contextmanager
def hub_errors(name: str, configuration: str | None) -> Iterator[str]:
    """Convert errors about a Hub data set into a DataError; give the name for messages."""
    label = f"{name} ({configuration})" if configuration else name
    advice = (
        "task.dataset may also be glue/<task>, or a local file or folder (which does not exist "
        "here); local files are named in task.train_files and task.validation_files"
    )
    try:
        yield label
    except (DatasetsError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        problem = (
            f"the Hub cannot be reached to load the data set {label}, and it is not in the local "
            "cache"
            if isinstance(error, ConnectionError)
            else f"the data set {label} cannot be loaded from the Hub"
        )
        raise DataError(f"{problem}: {first_line(error)}; {advice}") from error
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise DataError(
            f"the Hub data set {label} is a script, which `datasets` does not run "
            f"({first_line(error)}); use its version in parquet files (such as the branch "
            "refs/convert/parquet in task.revision), or local files"
        ) from error


HUB_NAME = "nyu-mll/glue"
PAIR, ACCURACY, BOTH = ("sentence1", "sentence2"), ("accuracy",), ("accuracy", "f1")
MNLI = (("premise", "hypothesis"), ACCURACY)
TASKS = {
    "cola": (("sentence",), ("matthews_correlation",)),
    "sst2": (("sentence",), ACCURACY),
    "mrpc": (PAIR, BOTH),
    "stsb": (PAIR, ("pearson", "spearman")),
    "qqp": (("question1", "question2"), BOTH),
    "mnli": MNLI,
    "mnli_matched": MNLI,
    "mnli_mismatched": MNLI,
    "qnli": (("question", "sentence"), ACCURACY),
    "rte": (PAIR, ACCURACY),
    "wnli": (PAIR, ACCURACY),
}
"""By name: the columns of text, and the metrics."""


def glue_rows(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return the training and validation rows of `glue/<task>`; the test rows have no labels."""
    name = task.data_name.partition("/")[2]
    if name not in TASKS:
        raise ConfigError(
            f"task.dataset: there is no GLUE task {name!r}{suggestion(name, TASKS)}; the tasks are "
            f"{', '.join(TASKS)}"
        )
    text, metrics = TASKS[name]
    fitting = "regression" if name == "stsb" else "classification"
    if task.type != fitting:
        raise ConfigError(f"task.type: must be {fitting} for {task.dataset} (got {task.type})")
    configuration, _, part = name.partition("_")
    held = f"validation_{part or 'matched'}" if configuration == "mnli" else "validation"
    columns = {"text_columns": text, "label_column": "label"}
    splits = {"train": "train", "validation": held}
    task = replace(task, dataset=HUB_NAME, dataset_config=configuration, splits=splits, **columns)
    return hub_rows(task, cache_dir=cache_dir, metrics=metrics)
