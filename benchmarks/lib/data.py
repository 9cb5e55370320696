"""Data and models that several benchmarks share: rows of text, and shapes of models."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Config = dict[str, Any]


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
