"""What the tests of data share: how a task is loaded, and files with a text and a label."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_runs import write_jsonl

from megakd.config.task import TaskConfig
from megakd.data.splits import Splits, load_splits


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Splits]:
    """Load the splits of a task, which is a classification unless its keys say otherwise."""

    def load(dataset: Path | str | None = None, *, seed: int = 1, **keys: Any) -> Splits:
        given = {"type": "classification", "dataset": dataset and str(dataset), **keys}
        return load_splits(TaskConfig(**given), seed=seed, cache_dir=tmp_path / "cache")

    return load


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, datasets.Dataset]:
    """The splits that the Hub has for every data set."""
    splits = datasets.DatasetDict()

    def load_dataset(_: str, *, split: str | None = None, **__: Any) -> Any:
        return splits if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return splits


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of files that is the only data set of the Hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for name in ("load_dataset", "load_dataset_builder"):
        read = partial(getattr(datasets, name), str(folder), cache_dir=str(tmp_path / "datasets"))

        def read_corpus(
            path: str,
            name: str | None = None,
            *,
            revision: str | None,
            read: Any = read,
            **keys: Any,
        ) -> Any:
            assert path in {"user/corpus", "user/chats"}
            assert name is None
            assert revision in {None, "v2"}
            return read(**keys)

        monkeypatch.setattr(datasets, name, read_corpus)
    return folder


@pytest.fixture
def write_rows() -> Callable[..., Path]:
    """Write rows into a file of the format that its name ends with."""

    def write(path: Path, rows: list[tuple], header: tuple[str, ...] = ("text", "label")) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        named = [dict(zip(header, row, strict=True)) for row in rows]
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(named), path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(named), encoding="utf-8")
        elif path.suffix in {".jsonl", ".ndjson"}:
            write_jsonl(path, named)
        elif path.suffix == ".tsv":
            lines = ("\t".join(map(str, row)) for row in (header, *rows))
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *rows])
        return path

    return write
