"""Local files and folders as a data set: csv, tsv, jsonl, json, parquet and txt.

A folder holds `train.*` and perhaps `validation.*` (or `valid`, `val`, `dev`) and `test.*`, each
perhaps in shards (`train-00000-of-00002.parquet`). A folder of txt files without such names is
many documents.
"""

from __future__ import annotations

import re
from pathlib import Path

from megakd.config import TaskConfig
from megakd.data.columns import rows_of_tables
from megakd.data.documents import read_documents
from megakd.data.readers import joined, read_csv, read_json, read_jsonl, read_parquet, read_tsv
from megakd.data.tables import SPLIT_ALIASES, Found, SplitName, Table
from megakd.errors import DataError

READERS = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}
SUFFIXES = (*READERS, ".json", ".txt")
SPLIT_FILE = re.compile(r"(?P<split>[a-z]+)(-\d+-of-\d+)?")


def looks_like_path(dataset: str) -> bool:
    """Whether a data set that is not on this disk was meant to be."""
    return (
        dataset.startswith((".", "/", "~"))
        or dataset.count("/") > 1
        or dataset.endswith("/")
        or Path(dataset).suffix.lower() in SUFFIXES
    )


def local_rows(path: Path, task: TaskConfig, *, cache_dir: Path) -> Found:
    """The rows of a file or folder.

    Raises:
        DataError: what is there cannot be read as a data set.
    """
    if not path.exists():
        raise DataError(f"task.dataset: {path} does not exist")
    tables = _folder_tables(path) if path.is_dir() else _file_tables(path)
    return rows_of_tables(tables, task, name=str(path), cache_dir=cache_dir)


def _file_tables(path: Path) -> dict[SplitName, Table]:
    suffix = _known_suffix(path)
    if suffix == ".txt":
        return {"train": read_documents([path], str(path), to_be_split=True)}
    if suffix == ".json":
        return read_json(path)
    return {"train": READERS[suffix](path)}


def _folder_tables(folder: Path) -> dict[SplitName, Table]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    shards: dict[SplitName, list[Path]] = {}
    for path in files:
        named = SPLIT_FILE.fullmatch(path.stem.lower())
        split = SPLIT_ALIASES.get(named["split"]) if named else None
        if split is not None:
            shards.setdefault(split, []).append(path)
    if "train" in shards:
        is_split = "validation" not in shards
        return {
            split: _split_table(paths, folder, to_be_split=is_split and split == "train")
            for split, paths in shards.items()
        }
    texts = [path for path in files if path.suffix.lower() == ".txt"]
    if texts and not shards:
        return {"train": read_documents(texts, str(folder), to_be_split=True)}
    there = ", ".join(path.name for path in sorted(folder.iterdir())[:10]) or "nothing"
    raise DataError(
        f"{folder}: train.* does not exist (with one of {', '.join(SUFFIXES)}); "
        f"what is there: {there}"
    )


def _split_table(paths: list[Path], folder: Path, *, to_be_split: bool) -> Table:
    stems = {re.sub(r"-\d+-of-\d+$", "", path.stem) + path.suffix for path in paths}
    if len(stems) > 1:
        raise DataError(
            f"{folder}: {' and '.join(sorted(stems))} are the same split; keep one of them"
        )
    suffix = _known_suffix(paths[0])
    if suffix == ".txt":
        return read_documents(paths, str(paths[0]), to_be_split=to_be_split)
    if suffix == ".json":
        return joined([read_json(path)["train"] for path in paths], str(folder))
    return joined([READERS[suffix](path) for path in paths], str(folder))


def _known_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"task.dataset: {path} has none of the known endings {', '.join(SUFFIXES)}")
    return suffix
