"""Data sets of local files and folders.

A folder holds `train.*` and optionally `validation.*` (or `valid`, `val`, `dev`) and `test.*`. Each
split may have several shards (`train-00000-of-00002.parquet`). In a folder of txt files without
such names, every file is a document. Files may also be given individually or by patterns. A folder
that was copied from the Hub is read as the Hub's data set.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from megakd.config.paths import (
    DATA_SUFFIXES,
    data_files_in,
    data_suffix,
    expand_path,
    without_compression,
)
from megakd.config.task import Files, TaskConfig, listed_files
from megakd.data.arrow import remembered_of
from megakd.data.hub import hub_tables, is_hub_folder
from megakd.data.readers import (
    content_hash,
    files_table,
)
from megakd.data.records import SPLIT_ALIASES, SPLIT_NAMES, SplitName, Table
from megakd.errors import DataError
from megakd.process.record import files_identity

WHOLE_FILE = "all rows"

# `datasets` may write a hash behind the count.
SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?$")


def local_tables(task: TaskConfig) -> dict[str, Table]:
    """Return the rows of the file or folder `task.dataset`, or of the files that the task names."""
    paths, key = split_files(task)
    name = None if task.dataset is None else str(expand_path(task.dataset))
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
    path, key = expand_path(task.dataset), "task.dataset"
    if not path.exists():
        raise DataError(f"{key}: {path} does not exist")
    if not path.is_dir():
        return {"train": [path]}, key
    shards = _shards(path)
    if "train" in shards:
        return shards, key
    texts = [file for file in data_files_in(path) if data_suffix(file) == ".txt"]
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
        path = expand_path(given)
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
    path = expand_path(given)
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
    for path in data_files_in(folder):
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


def _stem(path: Path) -> str:
    return Path(without_compression(path.name)).stem


def _ending(path: Path) -> str:
    return path.name.removeprefix(_stem(path))


def hash_of_file(file: Path, task: TaskConfig) -> str:
    """Return a hash of a file, which is that of reading, if it is data that is read whole.

    Others are sampled if they are large, such as models.
    """
    if task.streaming or data_suffix(file) not in DATA_SUFFIXES:
        return remembered_of(file, partial(files_identity, [file]), "sampled")
    return content_hash(file)
