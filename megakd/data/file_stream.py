"""Local files as a stream of texts: little is read before a text is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset

from megakd.config.task import TaskConfig
from megakd.data.cache import key_of
from megakd.data.chat_rows import OPTIONS, TOOLS, ChatColumns, chat_columns
from megakd.data.columns import choose_fields
from megakd.data.documents import documents_of
from megakd.data.files import READERS, known_suffix
from megakd.data.json_files import read_jsonl
from megakd.data.readers import readable
from megakd.data.row_text import document_of
from megakd.data.rows import PLACE
from megakd.data.tables import Table
from megakd.data.text_stream import ERROR, TextStream
from megakd.errors import DataError

SAMPLED_BYTES = 1 << 16


def file_stream(paths: Sequence[Path], task: TaskConfig, *, key: str) -> TextStream:
    """Return the texts of local files, in the order of the files.

    Args:
        paths: the files.
        task: the task; names the text columns, or leaves them to the defaults.
        key: the setting that names the files.

    Raises:
        DataError: a file cannot be read, or does not have the text columns.
    """
    tables = [table_of(path, key) for path in paths]
    # A JSON file without rows has no columns.
    tables = [table for table in tables if table.columns]
    if task.bad_rows == "error":
        for record in (first for table in tables for first in islice(table.records(), 1)):
            record.values.get("")  # a first line that cannot be read raises why
    if not tables:
        raise DataError(f"{key}: {', '.join(map(str, paths))} has no rows")
    choice = _choice(tables[0], task)
    for table in tables[1:]:
        _refuse_other(table, task, choice, where=table.name)
    if isinstance(choice, ChatColumns):
        chat, columns = choice, (*filter(None, choice[:3]), TOOLS, OPTIONS)
    else:
        chat, columns = None, choice
    # `datasets` distributes what is in a list, so that a list holds only the files.
    given = {"paths": [table.name for table in tables], "columns": columns, "key": key}
    try:
        rows = IterableDataset.from_generator(
            _rows, gen_kwargs={**given, "choice": choice, "task": task}
        )
    except OSError as error:
        raise DataError(
            f"the cache folder of the library `datasets` cannot be used: {error}; set "
            "HF_DATASETS_CACHE to a folder that can be written"
        ) from error
    return TextStream(
        name=task.data_name,
        rows=rows,
        columns=columns if chat else ("text",),
        digest=key_of(columns, [table.digest for table in tables]),
        chat=chat,
    )


def _choice(table: Table, task: TaskConfig) -> ChatColumns | tuple[str, ...]:
    return chat_columns(table, task) or choose_fields(table, task).text


def _refuse_other(table: Table, task: TaskConfig, choice: tuple[Any, ...], *, where: str) -> None:
    """Raise a DataError if rows would be read from other columns than the first row."""
    other = _choice(table, task)
    if other != choice:
        there, first = (" and ".join(filter(None, names[:3])) for names in (other, choice))
        raise DataError(
            f"{where} would be read from {there}, but the first row was read from {first}; give "
            "all rows the same columns, or name the columns to read (task.messages_column, "
            "task.prompt_column, task.text_columns)"
        )


def _rows(
    paths: list[str], columns: tuple[str, ...], choice: tuple[Any, ...], task: TaskConfig, key: str
) -> Iterator[dict[str, object]]:
    """Yield the texts of documents, or the columns of conversations and the places of the rows."""
    for path in paths:
        table = table_of(Path(path), key)
        for record in table.records():
            # A row of a jsonl file may have keys that no row before it has.
            if not record.values.keys() <= {*table.columns}:
                table = replace(table, columns=(*table.columns, *record.values))
                _refuse_other(table, task, choice, where=f"{path}, {record.place}")
            try:
                if isinstance(choice, ChatColumns):
                    place = f"{Path(path).name} {record.place}"
                    yield {**{name: record.values.get(name) for name in columns}, PLACE: place}
                elif (text := document_of(path, columns, record)) is not None:
                    yield {"text": text}
            except DataError as error:  # after an error of its own a generator cannot go on
                yield {ERROR: str(error)}


def table_of(path: Path, key: str) -> Table:
    """Return the rows of a file that may be large: nothing is read before a row is needed.

    The columns of a jsonl file are the keys of its first row with keys; later rows may have more.

    Args:
        path: the file.
        key: the setting that names the file.

    Raises:
        DataError: the file cannot be read row by row.
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
    if READERS[suffix] is read_jsonl:
        return read_jsonl(path, digest=sample_of, rows_for_columns=1)
    return READERS[suffix](path, digest=sample_of)


def sample_of(path: Path) -> str:
    """Return a hash of the name, the size, the first and the last 64 KiB of a file.

    Raises:
        DataError: the file cannot be read.
    """
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        digest = hashlib.sha256(f"{path.name}:{size}:".encode())
        for start in (0, max(0, size - SAMPLED_BYTES)):
            file.seek(start)
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
