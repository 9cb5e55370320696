"""The data set of a run with `task.streaming`: a stream to train on, and held-out rows on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
from datasets import Dataset, DatasetBuilder, IterableDataset

from megakd.config.task import TaskConfig
from megakd.data.bad_rows import BadRows
from megakd.data.cache import key_of
from megakd.data.chat_row_files import conversation_rows
from megakd.data.chat_rows import chat_columns, read_columns
from megakd.data.choosing import prompt_keys
from megakd.data.columns import (
    DEFAULT_METRICS,
    VERSION,
    choose_fields,
    conversation_columns,
    unlabelled_rows,
)
from megakd.data.file_stream import file_stream
from megakd.data.files import files_table, folder_files, named_files
from megakd.data.found import Found
from megakd.data.hub import hub_advice, hub_errors
from megakd.data.readers import by_split
from megakd.data.tables import Record, SplitName, Table
from megakd.data.text_stream import TextStream
from megakd.errors import ConfigError, DataError


def streamed_files(task: TaskConfig, *, cache_dir: Path) -> Found:
    """Return a stream of local files, and the rows of the held-out files.

    Raises:
        ConfigError: there are no validation files, and `task.max_eval_examples` is not set.
        DataError: a file does not exist or cannot be read.
    """
    paths: dict[SplitName, list[Path]]
    if task.dataset is None:
        paths = named_files(task)
    else:
        given = Path(task.dataset).expanduser()
        if not given.exists():
            raise DataError(f"task.dataset: {given} does not exist")
        paths = folder_files(given) if given.is_dir() else {"train": [given]}

    def key(split: SplitName) -> str:
        return "task.dataset" if task.dataset else f"task.{split}_files"

    stream = file_stream(paths.pop("train"), task, key=key("train"))
    tables: dict[SplitName, Table] = {
        split: files_table(found, key(split)) for split, found in paths.items()
    }
    return _found(stream, tables, task, cache_dir=cache_dir)


def streamed_hub_rows(task: TaskConfig, *, cache_dir: Path) -> Found:
    """Return a stream of the Hub data set `task.dataset`, and the rows of its held-out splits.

    The held-out rows are the first `task.max_eval_examples` of a split, because a stream can only
    be read from its beginning.

    Raises:
        ConfigError: there is no validation split, and `task.max_eval_examples` is not set.
        DataError: the Hub cannot be reached, the data set does not exist, or its columns do not
            fit the task.
    """
    name = task.data_name
    with hub_errors(name, task.dataset_config, advice=hub_advice(task)) as label:
        builder = datasets.load_dataset_builder(name, task.dataset_config)
        splits = cast("Mapping[str, IterableDataset]", builder.as_streaming_dataset())
        keys = by_split(map(str, splits), f"the Hub data set {label}")
        if "train" not in keys:
            raise DataError(f"the Hub data set {label} has no split named 'train'")
        digest = key_of(name, task.dataset_config, builder.hash, _addresses(builder))
        tables: dict[SplitName, Table] = {
            split: _hub_table(f"{name} ({key})", splits[key], key_of(digest, key), task)
            for split, key in keys.items()
        }
    train = tables.pop("train")
    chat = chat_columns(train, task)
    columns = read_columns(train, chat) if chat else choose_fields(train, task).text
    stream = TextStream(
        name=name,
        rows=splits[keys["train"]].select_columns(list(columns)),
        columns=columns,
        digest=key_of(digest, columns),
        chat=chat,
    )
    return _found(stream, tables, task, cache_dir=cache_dir)


def _addresses(builder: DatasetBuilder) -> dict[str, list[str]]:
    """Return the addresses of the files by split, which name the revision of the data set."""
    files: Mapping[Any, Any] = builder.config.data_files or {}
    return {str(split): list(map(str, addresses)) for split, addresses in files.items()}


def _hub_table(name: str, rows: IterableDataset, digest: str, task: TaskConfig) -> Table:
    first: Mapping[str, Any] = next(iter(rows), {})
    return Table(
        name=name,
        columns=tuple(first),
        records=partial(_records, rows, task.max_eval_examples),
        digest=key_of(digest, task.max_eval_examples),
    )


def _records(rows: IterableDataset, count: int | None) -> Iterator[Record]:
    for number, row in enumerate(islice(rows, count), start=1):
        yield Record(f"row {number}", row)


def _found(
    stream: TextStream, tables: Mapping[SplitName, Table], task: TaskConfig, *, cache_dir: Path
) -> Found:
    if task.bad_rows == "drop":
        stream = dataclasses.replace(stream, bad=BadRows("drop"))
    held: dict[SplitName, Dataset] = {
        split: _held_rows(stream, table, task, cache_dir=cache_dir)
        for split, table in tables.items()
    }
    digests = [VERSION, stream.digest, [(split, table.digest) for split, table in tables.items()]]
    if "validation" not in held:
        stream, held["validation"] = _cut(stream, task, cache_dir=cache_dir)
        digests.append(task.max_eval_examples)
    return Found(
        name=stream.name,
        splits={"train": held["validation"].select([]), **held},
        classes=None,
        metrics=DEFAULT_METRICS[task.type],
        source_hash=key_of("stream", *digests),
        stream=stream,
    )


def _held_rows(stream: TextStream, table: Table, task: TaskConfig, *, cache_dir: Path) -> Dataset:
    if stream.chat is not None:
        found = conversation_columns(table, task)
        return conversation_rows(table, found, cache_dir=cache_dir, bad_rows=task.bad_rows)
    columns = choose_fields(table, task).text
    return unlabelled_rows(table, columns, task, cache_dir=cache_dir)


def _cut(stream: TextStream, task: TaskConfig, *, cache_dir: Path) -> tuple[TextStream, Dataset]:
    count = task.max_eval_examples
    if count is None:
        raise ConfigError(
            f"task.streaming: {stream.name} has no validation split, and a stream has no end, so "
            "no share of it can be held out; add a validation split, or set "
            "task.max_eval_examples to hold out this many texts from the beginning of the stream"
        )
    first = stream.first_rows(count)
    if stream.chat is None:
        rows = unlabelled_rows(first, stream.columns, task, cache_dir=cache_dir)
    else:
        rows = conversation_rows(first, stream.chat, cache_dir=cache_dir)
    held = frozenset(prompt_keys(rows).tolist())
    rest = dataclasses.replace(stream, held_out=held)
    if next(rest.documents(), None) is None:
        raise DataError(
            f"task.max_eval_examples: {count} texts are held out for validation, and {stream.name} "
            f"has {len(rows)} and no further text to train on; set a smaller number"
        )
    return rest, rows
