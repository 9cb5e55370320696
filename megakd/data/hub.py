"""Data sets of the Hugging Face Hub, GLUE among them, loaded with `datasets` and its cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from megakd.config.task import TaskConfig
from megakd.data.arrow import SplitName, Table, remembered_of_rows
from megakd.data.readers import by_split, typed_table
from megakd.data.rows import Corpus, rows_of_tables
from megakd.errors import ConfigError, DataError, first_line, suggestion

ROWS_PER_READ = 1000


def hub_rows(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return the rows of the Hub data set `task.dataset`."""
    name = task.data_name
    loaded = load_hub(name, task.dataset_config, advice=hub_advice(task))
    keys = by_split(map(str, loaded), f"the Hub data set {name}")
    tables: dict[SplitName, Table] = {
        split: hub_table(f"{name} ({key})", loaded[key]) for split, key in keys.items()
    }
    if "train" not in tables:
        raise DataError(f"the Hub data set {name} has no split named 'train'")
    return rows_of_tables(tables, task, name=name, cache_dir=cache_dir)


def hub_advice(task: TaskConfig) -> str:
    """Return what to do if the Hub data set of a task cannot be loaded."""
    return (
        "task.dataset may also be glue/<task>, or a local file or folder, but "
        f"{task.data_name!r} does not exist on this machine"
    )


def load_hub(name: str, configuration: str | None, *, advice: str) -> DatasetDict:
    """Return all splits of a Hub data set, downloaded or from the cache of `datasets`."""
    with hub_errors(name, configuration, advice=advice) as label:
        loaded = datasets.load_dataset(name, configuration)
    if not isinstance(loaded, DatasetDict):
        raise DataError(f"the Hub data set {label} has no splits; {advice}")
    return loaded


@contextmanager
def hub_errors(name: str, configuration: str | None, *, advice: str) -> Iterator[str]:
    """Convert errors about a Hub data set into a DataError; give the name for messages."""
    label = f"{name} ({configuration})" if configuration else name
    try:
        yield label
    except ConnectionError as error:
        raise DataError(
            f"the Hub cannot be reached to load the data set {label}, and it is not in the "
            f"local cache ({first_line(error)}); {advice}"
        ) from error
    except (DatasetsError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise DataError(
            f"the data set {label} cannot be loaded from the Hub: {first_line(error)}; {advice}"
        ) from error
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise DataError(
            f"the Hub data set {label} is a script, which `datasets` does not run "
            f"({first_line(error)}); use a version of the data set in parquet files (such as its "
            "branch refs/convert/parquet), or download the rows as local files and set "
            "task.train_files"
        ) from error


def hub_table(name: str, rows: Dataset) -> Table:
    """Return a split of the Hub as a table."""
    return typed_table(name, rows, digest=remembered_of_rows(rows, "hub", partial(_digest, rows)))


def _digest(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for columns in rows.iter(ROWS_PER_READ):
        digest.update(json.dumps(columns, sort_keys=True, default=str).encode())
    return digest.hexdigest()


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
    advice = (
        "to train without the Hub, name files in task.train_files and task.validation_files (a tsv "
        "file has no quotes), with task.text_columns and task.label_column"
    )
    held = f"validation_{part or 'matched'}" if configuration == "mnli" else "validation"
    loaded = load_hub(HUB_NAME, configuration, advice=advice)
    for key in ("train", held):
        if key not in loaded:
            raise DataError(f"{HUB_NAME} ({configuration}) has no split {key!r}; {advice}")
    return rows_of_tables(
        {
            "train": hub_table(f"{HUB_NAME} {configuration} (train)", loaded["train"]),
            "validation": hub_table(f"{HUB_NAME} {configuration} ({held})", loaded[held]),
        },
        dataclasses.replace(task, text_columns=text, label_column="label"),
        name=task.data_name,
        cache_dir=cache_dir,
        metrics=metrics,
    )
