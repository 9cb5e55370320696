"""The tasks on which `minidisc.py` measures, and the run configs of its legs."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launching import ROOT
from real_cases import bert

if TYPE_CHECKING:
    import argparse

Config = dict[str, Any]
TOKENIZER = {"type": "wordpiece", "vocab_size": 8000}
CLINC_SPLITS = {"train": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Case:
    """One task.

    data: must be there, below the folder of real data; None: nothing.
    prepare: makes what the config reads out of the data in a folder.
    task: the config's section, of the folder of real data and of the prepared one.
    teacher_steps: what a small teacher from scratch needs to learn it, of 16 rows.
    """

    data: str | None
    prepare: Callable[[Path, Path], None]
    task: Callable[[Path, Path], Config]
    teacher_steps: int


def pydocs(_: Path, __: Path) -> Config:
    """The task of finding the Python package of a docstring."""
    return {"dataset": "pydocs", "max_length": 24, "max_eval_examples": 2000}


def clinc150(_: Path, folder: Path) -> Config:
    """150 intents, without what is out of scope."""
    columns = {"text_columns": ["text"], "label_column": "label"}
    return {"dataset": str(folder / "clinc150"), "max_length": 32, **columns}


def sst2(data: Path, _: Path) -> Config:
    """Sentiment of phrases, scored on the validation split."""
    return {"dataset": "glue/sst2", "data_dir": str(data / "glue"), "max_length": 64}


def write_clinc150(data: Path, folder: Path) -> None:
    """The three splits as csv."""
    splits = json.loads((data / "clinc150/data_full.json").read_text(encoding="utf-8"))
    (folder / "clinc150").mkdir(parents=True, exist_ok=True)
    for name, source in CLINC_SPLITS.items():
        path = folder / "clinc150" / f"{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *splits[source]])


def _nothing(_: Path, __: Path) -> None:
    """There is nothing to make."""


CASES = {
    "pydocs": Case(None, _nothing, pydocs, 600),
    "clinc150": Case("clinc150/data_full.json", write_clinc150, clinc150, 2500),
    "sst2": Case("glue/SST-2", _nothing, sst2, 1500),
}


def prepared_task(name: str, data: Path, folder: Path) -> Config:
    """Return the section `task`; write the data that the task reads."""
    case = CASES[name]
    case.prepare(ROOT / data, ROOT / folder)
    return {"type": "classification", **case.task(data, folder)}


def teacher_config(task: Config, given: argparse.Namespace, *, steps: int) -> Config:
    """The leg that every other one begins with: the teacher learns the task from its labels."""
    size = re.fullmatch(r"(\d+)x(\d+)", given.teacher)
    model = bert(layers=int(size[1]), width=int(size[2])) if size else given.teacher
    return {
        "task": task | ({"tokenizer": TOKENIZER} if size else {}),
        "student": {"model": model, "deepspeed": "zero2"},
        "method": {"name": "finetune"},
        **training_sections(given, steps=given.teacher_steps or steps, rate=given.teacher_rate),
    }


def schedule_config(task: Config, given: argparse.Namespace) -> Config:
    """The legs that are compared; each overrides the method's name and the teacher's folder."""
    method = {
        "name": "minidisc",
        "target_sparsity": given.target,
        "sparsities": given.grid,
        "tradeoff": given.tradeoff,
    }
    return {
        "task": task,
        "teacher": {"model": "overridden", "deepspeed": "teacher_zero3"},
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": method,
        **training_sections(given, steps=given.steps, rate=given.rate),
    }


def training_sections(given: argparse.Namespace, *, steps: int, rate: float) -> Config:
    """The settings for training, scoring and saving a leg."""
    evaluate_every = max(1, steps // given.evaluations)
    return {
        "train": {
            "per_device_train_batch_size": given.rows,
            "max_steps": steps,
            "learning_rate": rate,
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "max_grad_norm": 5.0,
        },
        "eval": {"eval_steps": evaluate_every, "per_device_eval_batch_size": 100},
        "save": {"save_steps": evaluate_every},
        "log": {"logging_steps": 25},
    }
