"""Data and models that several benchmarks share: texts, tasks, shapes and training sections."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Config = dict[str, Any]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BOOKS = Path("lm/standard-ebooks")
CLINC150 = Path("clinc150/data_full.json")


def bert(layers: int, width: int, heads: int, **keys: Any) -> Config:
    return {**llama(layers, width, heads, 4 * width), "model_type": "bert", **keys}


def llama(layers: int, width: int, heads: int, neurons: int, **keys: Any) -> Config:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **keys,
    }


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_labelled(path: Path, rows: Iterable[Iterable[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def clinc150(data: Path) -> dict[str, list[list[str]]]:
    """Return the splits of 150 intents, without the rows that are out of scope."""
    tree = json.loads((data / CLINC150).read_text(encoding="utf-8"))
    splits = {"train": "train", "validation": "val", "test": "test"}
    return {name: tree[source] for name, source in splits.items() if source in tree}


class Task(NamedTuple):
    """A task that finished models are scored on.

    data: must be there, below the folder of real data.
    section: the config's section, of the folder of real data and of a folder for prepared files.
    """

    data: str
    section: Callable[[Path, Path], Config]


def glue(name: str, folder: str, **keys: Any) -> Task:
    return Task(
        f"glue/{folder}",
        lambda data, _: {"dataset": f"glue/{name}", "data_dir": str(data / "glue"), **keys},
    )


def _banking77(data: Path, _: Path) -> Config:
    # The published test rows are the ones scored.
    files = {"train_files": "train.csv", "validation_files": "test.csv"}
    paths = {key: str(data / "banking77" / name) for key, name in files.items()}
    return {**paths, "text_columns": ["text"], "label_column": "category"}


def _clinc150(data: Path, folder: Path) -> Config:
    task: Config = {"text_columns": ["text"], "label_column": "label"}
    splits = clinc150(data)
    for split in ("train", "validation"):
        path = folder / "clinc150" / f"{split}_files.csv"
        task[f"{split}_files"] = str(write_labelled(path, splits[split]))
    return task


TASKS = {
    "sst2": glue("sst2", "SST-2", labelled_examples=8000),
    "banking77": Task("banking77/train.csv", _banking77),
    "clinc150": Task(str(CLINC150), _clinc150),
}


def pieces(text: str, characters: int) -> Iterator[str]:
    """Yield whole paragraphs, together of about so many characters."""
    gathered = list[str]()
    for paragraph in text.split("\n\n"):
        gathered.append(paragraph)
        if sum(map(len, gathered)) >= characters:
            yield "\n\n".join(gathered)
            gathered = []
    if gathered:
        yield "\n\n".join(gathered)


def train_section(rows: int, steps: int, rate: float, **keys: Any) -> Config:
    """Return the section `train`: rows of every rank, and a rate that falls to 0."""
    return {
        "per_device_train_batch_size": rows,
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        **keys,
    }
