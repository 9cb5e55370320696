"""Local files as a stream of texts: little is read before a text is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from datasets import IterableDataset

from megakd.config.task import TaskConfig
from megakd.data.cache import key_of
from megakd.data.chat_rows import chat_columns, read_columns
from megakd.data.columns import choose_fields, require
from megakd.data.documents import documents_of
from megakd.data.files import READERS, known_suffix
from megakd.data.json_files import read_jsonl
from megakd.data.readers import readable
from megakd.data.row_text import document_of
from megakd.data.rows import PLACE
from megakd.data.tables import Table
from megakd.data.text_stream import TextStream
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
    if not tables:
        raise DataError(f"{key}: {', '.join(map(str, paths))} has no rows")
    chat = chat_columns(tables[0], task)
    columns = read_columns(tables[0], chat) if chat else choose_fields(tables[0], task).text
    for table in tables[1:]:
        for column in columns:
            require(table, column, "task.text_columns")
    # `datasets` distributes what is in a list, so that a list holds only the files.
    given = {"paths": [table.name for table in tables], "columns": columns, "key": key}
    try:
        made = _rows if chat else _documents
        rows = IterableDataset.from_generator(made, gen_kwargs=given)
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


def _documents(paths: list[str], columns: tuple[str, ...], key: str) -> Iterator[dict[str, str]]:
    for path in paths:
        table = table_of(Path(path), key)
        for record in table.records():
            text = document_of(table.name, columns, record)
            if text is not None:
                yield {"text": text}


def _rows(paths: list[str], columns: tuple[str, ...], key: str) -> Iterator[dict[str, object]]:
    """Yield the columns of conversations as they are, and the places of the rows."""
    for path in paths:
        for record in table_of(Path(path), key).records():
            place = f"{Path(path).name} {record.place}"
            yield {**{column: record.values.get(column) for column in columns}, PLACE: place}


def table_of(path: Path, key: str) -> Table:
    """Return the rows of a file that may be large: nothing is read before a row is needed.

    The columns of a jsonl file are the keys of its first row.

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
