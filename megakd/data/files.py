"""Data sets of local files and folders, of the Hugging Face Hub, and of a notebook.

A folder holds `train.*` and optionally `validation.*` (or `valid`, `val`, `dev`) and `test.*`. Each
split may have several shards (`train-00000-of-00002.parquet`). In a folder of txt files without
such names, every file is a document. Files may also be given individually or by patterns. A folder
that was copied from the Hub is read as the Hub's data set.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, time, timedelta
from decimal import Decimal
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any, cast
from uuid import UUID

import datasets
import httpx2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDataset
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError
from huggingface_hub import constants, get_session, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from yaml import YAMLError

from megakd.config.paths import DATA_SUFFIXES, data_suffix, without_compression
from megakd.config.task import Files, TaskConfig, listed_files
from megakd.data.arrow import (
    SPLIT_ALIASES,
    SPLIT_NAMES,
    Row,
    SplitName,
    Table,
    key_of,
    remembered_of,
    rows_key,
    tables_of_rows,
)
from megakd.data.readers import (
    class_names_of,
    content_hash,
    files_table,
    plain_features,
    typed_table,
    untyped,
)
from megakd.errors import ConfigError, DataError, first_line, suggestion
from megakd.process.files import CARD, files_identity, sha256_of
from megakd.process.terminal import in_home

WHOLE_FILE = "all rows"

# `datasets` may write a hash behind the count.
SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?$")


def local_tables(task: TaskConfig) -> dict[str, Table]:
    """Return the rows of the file or folder `task.dataset`, or of the files that the task names."""
    paths, key = split_files(task)
    name = None if task.dataset is None else str(in_home(task.dataset))
    is_streamed, is_cut = task.streaming, "validation" not in paths
    return {
        split: files_table(
            files,
            key.format(split=split),
            name=name,
            to_be_split=is_cut and split == "train" and not is_streamed,
            is_streamed=is_streamed and split == "train",
        )
        for split, files in paths.items()
    }


def split_files(task: TaskConfig) -> tuple[dict[SplitName, list[Path]], str]:
    """Return the local files of a task by split, and the setting that names a `{split}`."""
    if task.dataset is None:
        return named_files(task), "task.{split}_files"
    path, key = in_home(task.dataset), "task.dataset"
    if not path.exists():
        raise DataError(f"{key}: {path} does not exist")
    if not path.is_dir():
        return {"train": [path]}, key
    shards = _shards(path)
    if "train" in shards:
        return shards, key
    texts = [file for file in _data_files(path) if data_suffix(file) == ".txt"]
    if texts and not shards:  # without the name of a split
        return {"train": texts}, key
    there = ", ".join(file.name for file in sorted(path.iterdir())[:10]) or "nothing"
    raise DataError(
        f"{path}: the file train.* does not exist (supported endings: "
        f"{', '.join(DATA_SUFFIXES)}); the folder holds: {there}"
    )


def named_files(task: TaskConfig) -> dict[SplitName, list[Path]]:
    """Return the files of `task.train_files`, `validation_files` and `test_files` by split."""
    paths: dict[SplitName, list[Path]] = {
        split: matching_files(files, f"task.{split}_files")
        for split in SPLIT_NAMES
        if (files := getattr(task, f"{split}_files")) is not None
    }
    refuse_twice({f"task.{split}_files": matches for split, matches in paths.items()})
    return paths


def matching_files(files: Files, key: str) -> list[Path]:
    """Return the files that a setting names, in order; files of a pattern are sorted by name."""
    paths: list[Path] = []
    for given in listed_files(files):
        path = in_home(given)
        if path.is_file():
            paths.append(path)
        elif path.is_dir():
            raise DataError(f"{key}: {path} is a folder; name its files, such as {path}/*.jsonl")
        elif glob.has_magic(given):
            # The name of a folder that exists, such as runs[1], is no pattern.
            folder = next(parent for parent in path.parents if parent.exists())
            names = glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True)  # noqa: PTH207
            matches = sorted(folder / name for name in names if (folder / name).is_file())
            if not matches:
                raise DataError(f"{key}: no file matches {given}")
            _refuse_missing(matches, key, pattern=path.name)
            paths += matches
        else:
            raise DataError(f"{key}: {path} does not exist")
    refuse_twice({key: paths})
    return paths


def refuse_twice(paths: Mapping[str, Sequence[Path]]) -> None:
    """Raise a DataError if settings, or the list of one, name the same file twice."""
    seen: dict[Path, tuple[str, Path]] = {}
    for key, path in ((key, path) for key, named in paths.items() for path in named):
        other, earlier = seen.setdefault(path.resolve(), (key, path))
        if earlier is not path:
            again = "is listed more than once" if other == key else f"is also a file of {other}"
            raise DataError(
                f"{key}: {path} {again} (as {earlier}), so that its rows would count twice; list "
                "every file once"
            )


def scored_table(given: str, task: TaskConfig) -> tuple[Table, str]:
    """Return the rows to score, and their split, for a file, pattern or folder given by the user.

    All rows of files are scored. Of a folder, the test rows are scored, or the validation rows if
    it has no test split.
    """
    path = in_home(given)
    if not path.is_dir():
        return files_table(matching_files(given, "--data"), "--data"), WHOLE_FILE
    tables, shards = dict[str, Table](), dict[SplitName, list[Path]]()
    if is_hub_folder(path):
        tables = hub_tables(replace(task, dataset=given, revision=None, splits=None))
    else:
        shards = _shards(path)
    there = [*tables, *shards]
    split: SplitName = "test" if "test" in there else "validation"
    if split not in there:
        raise DataError(
            f"--data: {path} holds {', '.join(there) or 'no split'}, and neither a test nor a "
            "validation split; give a file or folder with one of the two"
        )
    return tables.get(split) or files_table(shards[split], "task.dataset", name=str(path)), split


def _shards(folder: Path) -> dict[SplitName, list[Path]]:
    shards: dict[SplitName, list[Path]] = {}
    for path in _data_files(folder):
        split = SPLIT_ALIASES.get(SHARD.sub("", _stem(path)).lower())
        if split is not None:
            shards.setdefault(split, []).append(path)
    for paths in shards.values():
        names = {SHARD.sub(r"-*-of-\2", _stem(path)) + _ending(path) for path in paths}
        if len(names) > 1:
            raise DataError(
                f"{folder}: {' and '.join(sorted(names))} are names of the same split; keep one of "
                "them"
            )
        _refuse_missing(paths, str(folder))
    return shards


def _refuse_missing(paths: Sequence[Path], place: str, *, pattern: str = "*") -> None:
    sets: dict[tuple[Path, str, str], set[int]] = {}
    for path in paths:
        if shard := SHARD.search(_stem(path)):
            kind = (path.with_name(_stem(path)[: shard.start()]), shard[2], _ending(path))
            there = sets.setdefault(kind, set())
            if int(shard[1]) in there:
                raise DataError(f"{place}: {path} is there with another hash; keep one of the two")
            there.add(int(shard[1]))
    for (path, count, suffix), there in sets.items():
        first = int(int(count) in there)  # some writers count from 1
        for number in sorted({*range(first, first + int(count))} - there):
            name = f"{path.name}-{str(number).zfill(len(count))}-of-{count}{suffix}"
            if fnmatch(name, pattern):
                raise DataError(
                    f"{place}: the shard {name} is missing, and {len(there)} of {count} are there; "
                    "copy it to them, or name the files to use one by one"
                )


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if data_suffix(path) in DATA_SUFFIXES and not path.name.startswith(".")
    )


def _stem(path: Path) -> str:
    return Path(without_compression(path.name)).stem


def _ending(path: Path) -> str:
    return path.name.removeprefix(_stem(path))


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
    return says_files or (not _data_files(path) and any(inside))


def hub_source(task: TaskConfig) -> tuple[str, dict[str, Any]]:
    """Return the name of a data set, of the Hub or a folder, and options, for `datasets`."""
    path = in_home(task.data_name)
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
    is_folder = in_home(name).is_dir()
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


def hash_of_file(file: Path, task: TaskConfig) -> str:
    """Return a hash of a file, which is that of reading, if it is data that is read whole.

    Others are sampled if they are large, such as models.
    """
    if task.streaming or data_suffix(file) not in DATA_SUFFIXES:
        return remembered_of(file, partial(files_identity, [file]), "sampled")
    return content_hash(file)


def sources_of_rows(data: Any, folder: Path) -> dict[str, str]:
    """Return the keys of `task` for the data of a Python call: one source, or rows by split.

    Raises:
        DataError: see `file_of_rows`; a name is no split, or there are no training rows.
    """
    names = [*map(str, data)] if isinstance(data, Mapping) else []
    splits = {*names} & {*SPLIT_ALIASES}
    if not splits and not isinstance(data, DatasetDict):
        return {"dataset": file_of_rows(data, folder)}
    other = {*names} - splits
    if other and not isinstance(data, DatasetDict):
        raise DataError(
            f"data: names {', '.join(sorted(splits))} and {', '.join(sorted(other))}: give rows by "
            "split (train, validation, test), or columns without such names"
        )
    chosen = splits_of(names, "in data", key="give them as")
    return {f"{split}_files": file_of_rows(data[name], folder) for split, name in chosen.items()}


def file_of_rows(data: Any, folder: Path) -> str:
    """Return a path or a name of the Hub as it is, and the file to which other rows are written.

    The file is named after its content, so that the same rows go on with the same run. It is jsonl,
    which keeps the keys and the types of each row; or parquet, if the data declares class names,
    which it stores in their order.

    Raises:
        DataError: the data has no rows, or columns that occur twice or differ in length.
    """
    if isinstance(data, str | Path):
        return str(data)
    folder.mkdir(parents=True, exist_ok=True)
    suffix, write = ".jsonl", _write_rows
    is_set = isinstance(data, Dataset | IterableDataset)
    # A transform gives other columns than a Dataset has.
    if is_set and not (isinstance(data, Dataset) and data.format["type"] == "custom"):
        features = plain_features(data.features or {})
        data = data.with_format(None).select_columns([*features]) if features else data
        if class_names_of(features):
            suffix, write = ".parquet", _write_typed
    draft = folder / f".data-{os.getpid()}"
    try:
        digest = write(data, draft)
        path = folder / f"data-{digest[:12]}{suffix}"
        if not path.exists():  # a new time of the file would be other data
            draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
    return str(path)


def _write_typed(data: Dataset | IterableDataset, path: Path) -> str:
    features = cast("Features", data.features)
    # Another version of Arrow writes other bytes.
    digest = hashlib.sha256(repr(class_names_of(features)).encode())
    with pq.ParquetWriter(path, features.arrow_schema) as file:
        rows = cast("Iterable[Row]", map(features.encode_example, data))
        for table in tables_of_rows(rows, features):
            file.write_table(table)
            for batch in table.combine_chunks().to_batches():
                digest.update(batch.serialize())
    return digest.hexdigest()


def _write_rows(data: object, path: Path) -> str:
    count = 0
    # Half of a surrogate pair becomes an escape of JSON.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for count, row in enumerate(_rows(data), 1):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"data: row {count} is a {type(row).__name__}; a row is a mapping of columns, "
                    "such as {'text': …, 'label': …}"
                )
            fields = [_field(column, value, count) for column, value in row.items()]
            file.write(f"{{{', '.join(fields)}}}\n")
    if count == 0:
        raise DataError("data: there is no row")
    return sha256_of(path)


def _rows(data: Any) -> Iterable[object]:
    if isinstance(data, Dataset | IterableDataset):
        kinds, rows = data.features or {}, cast("Iterable[Row]", data)
        return ({key: untyped(one, kinds.get(key)) for key, one in row.items()} for row in rows)
    if isinstance(data, pd.Series):
        data = data.to_frame(data.name or "text")
    if isinstance(data, pd.DataFrame):
        for column in data.columns[data.columns.map(str).duplicated()]:
            raise DataError(f"data: column {column!r} occurs more than once; rename one of the two")
        return cast("Any", data).to_dict("records")
    columns: list[Any] = [*data.values()] if isinstance(data, Mapping) else []
    columns = [one.tolist() if hasattr(one, "tolist") else one for one in columns]
    if columns and all(isinstance(one, Sequence) and not isinstance(one, str) for one in columns):
        lengths = dict(zip(data, map(len, columns), strict=True))
        if len({*lengths.values()}) > 1:
            raise DataError(f"data: the columns have different numbers of rows: {lengths}")
        return (dict(zip(data, row, strict=True)) for row in zip(*columns, strict=True))
    if not isinstance(data, Iterable) or isinstance(data, Mapping):
        raise DataError(
            f"data: is a {type(data).__name__}; give a path, a name of the Hub, a data frame, one "
            "datasets.Dataset, or a list of rows such as {'text': …, 'label': …}"
        )
    return data


def _field(column: object, value: Any, number: int) -> str:
    # pandas has NaN, NaT and NA in the place of a missing value.
    is_missing = pd.api.types.is_scalar(value) and pd.isna(value)
    try:
        value = None if is_missing else value
        return f"{_JSON.encode(str(column))}: {_JSON.encode(value)}"
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"data: row {number}, column {column!r}: {error}") from error


def _in_json(value: Any) -> object:
    if hasattr(value, "tolist") and not isinstance(value, np.datetime64 | np.timedelta64):
        return value.tolist()  # a number or an array of NumPy, or a tensor
    if value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, Decimal):
        return int(value) if (number := float(value)).is_integer() else number
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, date | time | timedelta | np.generic | PurePath | UUID):
        return str(value)
    # No text and no label: refused with its type where the column is read, and only there.
    return {type(value).__name__: "…"}


_JSON = json.JSONEncoder(ensure_ascii=False, default=_in_json)
