"""Rows that a program gives: lists, frames and data sets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any, cast
from uuid import UUID

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDataset

from megakd.data.arrow import Row, tables_of_rows
from megakd.data.hub import splits_of
from megakd.data.readers import (
    class_names_of,
    plain_features,
    untyped,
)
from megakd.data.records import SPLIT_ALIASES
from megakd.errors import DataError
from megakd.process.files import sha256_of


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
