"""The data set of a run with `task.streaming`: a stream to train on, and held-out rows on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
from datasets import Dataset, IterableDataset

from megakd.config.task import TaskConfig
from megakd.data.arrow import key_of
from megakd.data.chat.conversations import OPTIONS, TOOLS
from megakd.data.choosing import prompt_keys
from megakd.data.files import READERS, known_suffix, split_files, tables_of_files
from megakd.data.hub import hub_advice, hub_errors
from megakd.data.kinds import RowKind, is_blank
from megakd.data.readers import by_split, documents_of, readable
from megakd.data.rows import (
    DEFAULT_METRICS,
    ERROR,
    LINE,
    VERSION,
    Corpus,
    TextStream,
    numbered,
    rows_of,
)
from megakd.data.tables import BadRows, SplitName, Table
from megakd.errors import ConfigError, DataError

SAMPLED_BYTES = 1 << 16


def streamed_files(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return a stream of local files, and the rows of the held-out files."""
    paths, key = split_files(task)
    stream = file_stream(paths.pop("train"), task, key=key.format(split="train"))
    return _corpus(stream, tables_of_files(paths, key), task, cache_dir=cache_dir)


def streamed_hub_rows(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return a stream of the Hub data set `task.dataset`, and the rows of its held-out splits.

    The held-out rows are the first `task.max_eval_examples` of a split, because a stream can only
    be read from its beginning.
    """
    name = task.data_name
    with hub_errors(name, task.dataset_config, advice=hub_advice(task)) as label:
        builder = datasets.load_dataset_builder(name, task.dataset_config)
        splits = cast("Mapping[str, IterableDataset]", builder.as_streaming_dataset())
        keys = by_split(map(str, splits), f"the Hub data set {label}")
        if "train" not in keys:
            raise DataError(f"the Hub data set {label} has no split named 'train'")
        files: Mapping[Any, Any] = builder.config.data_files or {}
        addresses = {str(split): list(map(str, listed)) for split, listed in files.items()}
        digest = key_of(name, task.dataset_config, builder.hash, addresses)
        tables: dict[SplitName, Table] = {
            split: _hub_table(f"{name} ({key})", splits[key], key_of(digest, key), task)
            for split, key in keys.items()
        }
    train = tables.pop("train")
    kind = RowKind.of(task, train)
    columns = kind.columns
    if kind.is_chat:
        columns = tuple(column for column in train.columns if column in columns)
    rows = splits[keys["train"]].select_columns(list(columns))
    table = replace(train, name=name, digest=key_of(digest, columns))
    return _corpus(TextStream(table=table, rows=rows, kind=kind), tables, task, cache_dir=cache_dir)


def _hub_table(name: str, rows: IterableDataset, digest: str, task: TaskConfig) -> Table:
    first: Mapping[str, Any] = next(iter(rows), {})
    return Table(
        name=name,
        columns=tuple(first),
        records=lambda: numbered(islice(rows, task.max_eval_examples), rows.features or {}),
        digest=key_of(digest, task.max_eval_examples),
    )


def _corpus(
    stream: TextStream, tables: Mapping[SplitName, Table], task: TaskConfig, *, cache_dir: Path
) -> Corpus:
    if task.bad_rows == "drop":
        stream = replace(stream, bad=BadRows("drop"))
    held: dict[SplitName, Dataset] = {}
    for split, table in tables.items():
        kind = RowKind.of(task, table, as_chat=stream.kind.is_chat)
        held[split] = rows_of(table, kind, task, cache_dir=cache_dir)
    digests: list[object] = [VERSION, stream.table.digest]
    digests.append([(split, table.digest) for split, table in tables.items()])
    if "validation" not in held:
        stream, held["validation"], digest = _cut(stream, task, cache_dir=cache_dir)
        digests.append(digest)
    return Corpus(
        name=stream.table.name,
        splits={"train": held["validation"].select([]), **held},
        classes=None,
        metrics=DEFAULT_METRICS[task.type],
        source_hash=key_of("stream", *digests),
        stream=stream,
    )


def _cut(
    stream: TextStream, task: TaskConfig, *, cache_dir: Path
) -> tuple[TextStream, Dataset, str]:
    name = stream.table.name
    if task.max_eval_examples is None:
        raise ConfigError(
            f"task.streaming: {name} has no validation split, and a stream has no end, so no share "
            "of it can be held out; add a validation split, or set task.max_eval_examples to hold "
            "out this many texts from the beginning of the stream"
        )
    first = stream.first_rows(task.max_eval_examples)
    rows = rows_of(first, stream.kind, task, cache_dir=cache_dir)
    rest = replace(stream, held_out=frozenset(prompt_keys(rows).tolist()))
    if next(rest.read(), None) is None:
        raise DataError(
            f"task.max_eval_examples: {task.max_eval_examples} texts are held out for validation, "
            f"and {name} has {len(rows)} and no further text to train on; set a smaller number"
        )
    return rest, rows, first.digest


def file_stream(paths: Sequence[Path], task: TaskConfig, *, key: str) -> TextStream:
    """Return the texts of local files, in the order of the files."""
    tables = [table_of(path, key) for path in paths]
    # A JSON file without rows has no columns.
    tables = [table for table in tables if table.columns]
    if task.bad_rows == "error":
        for record in (first for table in tables for first in islice(table.records(), 1)):
            record.values.get("")  # a first line that cannot be read raises why
    if not tables:
        raise DataError(f"{key}: {', '.join(map(str, paths))} has no rows")
    kind = RowKind.of(task, tables[0])
    for table in tables[1:]:
        _refuse_other(table, task, kind, where=table.name)
    # `datasets` distributes what is in a list, so that a list holds only the files.
    given = {"paths": [table.name for table in tables], "kind": kind, "task": task, "key": key}
    try:
        rows = IterableDataset.from_generator(_rows, gen_kwargs=given)
    except OSError as error:
        raise DataError(
            f"the cache folder of the library `datasets` cannot be used: {error}; set "
            "HF_DATASETS_CACHE to a folder that can be written"
        ) from error
    whole = Table(
        name=task.data_name,
        columns=kind.columns,
        records=lambda: numbered(rows, {}),
        digest=key_of(kind.columns, [table.digest for table in tables]),
    )
    return TextStream(table=whole, rows=rows, kind=kind)


def _refuse_other(table: Table, task: TaskConfig, kind: RowKind, *, where: str) -> None:
    other = RowKind.of(task, table)
    if other != kind:
        shown = [
            " and ".join(column for column in read.columns if column not in (TOOLS, OPTIONS))
            for read in (other, kind)
        ]
        raise DataError(
            f"{where} would be read from {shown[0]}, but the first row was read from {shown[1]}; "
            "give all rows the same columns, or name the columns to read (task.messages_column, "
            "task.prompt_column, task.text_columns)"
        )


def _rows(
    paths: list[str], kind: RowKind, task: TaskConfig, key: str
) -> Iterator[dict[str, object]]:
    for path in paths:
        table = table_of(Path(path), key)
        for record in table.records():
            # A row of a jsonl file may have keys that no row before it has.
            if not record.values.keys() <= {*table.columns}:
                table = replace(table, columns=(*table.columns, *record.values))
                _refuse_other(table, task, kind, where=f"{path}, {record.place}")
            try:
                # Blank documents never had a place in the stream, at which a run may go on.
                if kind.is_chat or not is_blank(kind.row(table, record)):
                    values = {name: record.values.get(name) for name in kind.columns}
                    yield {**values, LINE: f"{Path(path).name} {record.place}"}
            except DataError as error:  # after an error of its own a generator cannot go on
                yield {ERROR: str(error)}


def table_of(path: Path, key: str) -> Table:
    """Return the rows of a file that may be large: nothing is read before a row is needed.

    The columns of a jsonl file are the keys of its first row with keys; later rows may have more.
    """
    suffix = known_suffix(path, key)
    if suffix == ".json":
        raise DataError(
            f"{key}: {path} is a json file, which can only be read whole, and task.streaming is "
            "true; write one object per line and name the file .jsonl"
        )
    if suffix == ".txt":
        records = partial(documents_of, [path])
        return Table(name=str(path), columns=("text",), records=records, digest=sample_of(path))
    return READERS[suffix](path, digest=sample_of)


def sample_of(path: Path) -> str:
    """Return a hash of the name, the size, the first and the last 64 KiB of a file."""
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        digest = hashlib.sha256(f"{path.name}:{size}:".encode())
        for start in (0, max(0, size - SAMPLED_BYTES)):
            file.seek(start)
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
