"""Rows of a notebook as a file of the run: a data frame, a data set, or mappings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megakd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Rows = Iterable[Mapping[str, Any]]
"""Rows by column; a pandas.DataFrame or a datasets.Dataset is one too."""


def file_of_rows(data: Any, folder: Path) -> str:
    """Return a path or a name of the Hub as it is, and the file to which other rows are written.

    The file is named after its content, so that the same rows go on with the same run.

    Raises:
        DataError: the rows are not mappings, or hold values that JSON does not have.
    """
    if isinstance(data, str | Path):
        return str(data)
    folder.mkdir(parents=True, exist_ok=True)
    digest, count, draft = hashlib.sha256(), 0, folder / ".data.jsonl"
    try:
        with draft.open("wb") as file:
            for count, row in enumerate(_rows(data), 1):
                line = _line(row, count).encode() + b"\n"
                digest.update(line)
                file.write(line)
        if count == 0:
            raise DataError("data: there is no row")
        path = folder / f"data-{digest.hexdigest()[:12]}.jsonl"
        if not path.exists():  # a new time of the file would be other data
            draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
    return str(path)


def _rows(data: Any) -> Iterator[Mapping[str, Any]]:
    if hasattr(data, "to_dict") and hasattr(data, "iloc"):  # a data frame of pandas
        data = data.to_dict("records")
    features = getattr(data, "features", None) or {}
    features = {name: getattr(one, "feature", one) for name, one in features.items()}
    named = {name: one for name, one in features.items() if hasattr(one, "int2str")}
    if not isinstance(data, Iterable) or isinstance(data, Mapping):
        raise DataError(
            f"data: is a {type(data).__name__}; give a path, a name of the Hub, a data frame, a "
            "datasets.Dataset, or a list of rows such as {'text': …, 'label': …}"
        )
    for number, row in enumerate(cast("Dataset | Rows", data), 1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"data: row {number} is a {type(row).__name__}; a row is a mapping of columns, "
                "such as {'text': …, 'label': …}"
            )
        # A class by its name: another file may number the classes in another way.
        known = [key for key in named if row[key] not in (None, -1)]
        yield {**row, **{key: named[key].int2str(row[key]) for key in known}}


def _line(row: Mapping[str, Any], number: int) -> str:
    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):  # a number or an array of NumPy
            return value.tolist()
        raise DataError(
            f"data: row {number} holds a {type(value).__name__}; give texts, numbers and lists"
        )

    # pandas has NaN, which differs from itself, in the place of a missing text.
    is_nan = {key for key, one in row.items() if isinstance(one, float) and one != one}  # noqa: PLR0124
    values = {key: None if key in is_nan else value for key, value in row.items()}
    return json.dumps(values, ensure_ascii=False, default=plain)
