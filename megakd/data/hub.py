"""Data sets of the Hub, from the network or copied, and the tasks of GLUE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import datasets
import httpx2
from datasets import Dataset
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError
from huggingface_hub import constants, get_session, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from yaml import YAMLError

from megakd.config.paths import DATA_SUFFIXES, data_files_in, data_suffix, expand_path
from megakd.config.task import TaskConfig
from megakd.data.arrow import key_of, remembered_of, rows_key
from megakd.data.readers import (
    typed_table,
)
from megakd.data.records import SPLIT_ALIASES, SplitName, Table
from megakd.errors import ConfigError, DataError, first_line, suggestion
from megakd.process.record import files_identity
from megakd.process.seals import CARD


@cache
def silent_hub() -> str | None:
    """Return why the Hub does not answer, for whose libraries only their caches count then.

    They would repeat each request for half a minute. None: it does, or `HF_HUB_OFFLINE` is set.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (httpx2.ConnectError, httpx2.TimeoutException) as error:
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} does not answer ({first_line(error)})"
    except (httpx2.HTTPError, OSError):
        pass  # whoever asks for a file tells it
    return None


def is_hub_folder(path: Path) -> bool:
    """Return whether a folder is laid out as a data set of the Hub: its card or subfolders say."""
    if not path.is_dir():
        return False
    card = path / CARD
    try:
        says_files = card.is_file() and "configs" in (metadata_load(card) or {})
    except (ValueError, YAMLError) as error:
        raise DataError(f"{card}: its metadata cannot be read: {first_line(error)}") from error
    inside = (data_suffix(file) in DATA_SUFFIXES for file in path.glob("*/*"))
    return says_files or (not data_files_in(path) and any(inside))


def hub_source(task: TaskConfig) -> tuple[str, dict[str, Any]]:
    """Return the name of a data set, of the Hub or a folder, and options, for `datasets`."""
    path = expand_path(task.data_name)
    if not path.is_dir():
        return task.data_name, {"revision": task.revision}
    # `datasets` knows a folder again by the times of its files, which a copy may keep.
    files = sorted(file for file in path.rglob("*") if file.is_file())
    known = [remembered_of(one, partial(files_identity, [one]), "sampled") for one in files]
    names = [str(one.relative_to(path)) for one in files]
    cache = Path(datasets_config.HF_DATASETS_CACHE, key_of(names, known))
    return str(path), {"cache_dir": str(cache)}


def hub_tables(task: TaskConfig) -> dict[str, Table]:
    """Return the rows of the splits of `task.dataset`, of the Hub or of a folder of one."""
    name, options = hub_source(task)
    load = partial(datasets.load_dataset, name, name=task.dataset_config, **options)
    with hub_errors(name, task.dataset_config) as label:
        if task.splits is None:
            loaded = cast("Mapping[str, Dataset]", load())
            splits = splits_of([*loaded], label)
        else:
            splits = task.splits
            loaded = {key: cast("Dataset", load(split=key)) for key in splits.values()}
    return {
        split: typed_table(f"{name} ({key})", loaded[key], digest=rows_key(loaded[key]))
        for split, key in splits.items()
    }


def splits_of(
    names: list[str], label: str, *, key: str = "name those to use, as in task.splits:"
) -> dict[SplitName, str]:
    """Return the name of every split among the names that a data set has."""
    splits: dict[SplitName, str] = {}
    for name in names:
        split = SPLIT_ALIASES.get(name.lower())
        if split is not None and splits.setdefault(split, name) != name:
            raise DataError(
                f"the data set {label}: {splits[split]!r} and {name!r} are names of the same "
                f"split ({split}); name the one to use in task.splits"
            )
    if "train" not in splits:
        raise DataError(
            f"the data set {label} has no split named 'train'; its splits are "
            f"{', '.join(names)}: {key} {{train: {names[0]}}}"
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
    is_folder = expand_path(name).is_dir()
    silent = None if is_folder else silent_hub()
    try:
        yield label
    except (DatasetsError, HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        if is_folder:
            raise DataError(
                f"the data set {label} cannot be loaded: {first_line(error)}"
            ) from error
        problem = (
            f"the Hub cannot be reached to load the data set {label}, and it is not in the local "
            "cache"
            if isinstance(error, ConnectionError)
            else f"the data set {label} cannot be loaded from the Hub"
        )
        raise DataError(f"{problem}: {silent or first_line(error)}; {advice}") from error


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


def glue_task(task: TaskConfig) -> tuple[TaskConfig, tuple[str, ...]]:
    """Return the task and the metrics of `glue/<task>`, whose test rows have no labels."""
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
    return task, metrics
