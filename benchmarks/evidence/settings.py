"""The settings of the evidence: data, teachers and students of each.

The numbers of a setting were chosen once, with labels alone and with plain distillation, before any
method was compared; notebook/evidence.md lists what was tried.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.data import Config, write_labelled

Rows = list[tuple[str, str]]
"""Texts with their labels."""
RUN_SPLITS = ("train", "validation")
VALIDATION_ROWS = 1000
SST2_ROWS = 12_000
POOL = {"one": 1, "two": 2, "four": 4, "six": 6}
"""Teachers, with the layers of the pretrained encoder that each has; `one` is weaker than the
student."""
STUDENT_LAYERS = (2, 5)
"""Layers of the teacher `six` that the student starts from."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Optimizer steps of 32 rows, and the learning rate.

    bf16: a CPU with AVX-512 BF16 computes a step in about half of the time.
    """

    steps: int
    rate: float

    def train(self) -> Config:
        return {
            "per_device_train_batch_size": 32,
            "max_steps": self.steps,
            "learning_rate": self.rate,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "bf16": True,
        }


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A task with its teachers and its student.

    needs: files of the data folder. splits: reads the three splits from the data folder.
    labels: training rows that keep their label, drawn by the seed; None: all.
    teacher: how every teacher learns, from labels. student: how every student learns.
    label_rate: learning rate of a student that learns from labels alone.
    cut_label_rate: the same, of a student that is cut out of the teacher's heads and neurons.
    """

    name: str
    needs: tuple[str, ...]
    splits: Callable[[Path], Mapping[str, Rows]]
    labels: int | None
    max_length: int
    teacher: Learning
    student: Learning = Learning(steps=400, rate=1e-3)
    label_rate: float
    cut_label_rate: float

    def task(self, folder: Path) -> Config:
        """Return the section `task` of the files that `write_splits` has written to a folder.

        The test rows are not part of a run: they are scored after the run.
        """
        files = {f"{split}_files": str(folder / f"{split}.csv") for split in RUN_SPLITS}
        section = {"type": "classification", **files, "text_columns": ["text"]}
        labels = {} if self.labels is None else {"labelled_examples": self.labels}
        return {**section, "label_column": "label", "max_length": self.max_length, **labels}

    def write_splits(self, data: Path, folder: Path) -> None:
        for split, rows in self.splits(data).items():
            write_labelled(folder / f"{split}.csv", rows)


def clinc150(data: Path) -> Mapping[str, Rows]:
    """Read 150 intents, without the rows that are out of scope."""
    tree = json.loads((data / "clinc150/data_full.json").read_text(encoding="utf-8"))
    rows = {split: [(text, label) for text, label in tree[split]] for split in ("train", "test")}
    validation = shuffled((text, label) for text, label in tree["val"])
    return {**rows, "validation": validation[:VALIDATION_ROWS]}


def banking77(data: Path) -> Mapping[str, Rows]:
    """Read 77 intents of a bank's customers; validation rows come from the training file."""
    rows = shuffled(read_table(data / "banking77/train.csv", ("text", "category"), delimiter=","))
    test = read_table(data / "banking77/test.csv", ("text", "category"), delimiter=",")
    return {"train": rows[VALIDATION_ROWS:], "validation": rows[:VALIDATION_ROWS], "test": test}


def sst2(data: Path) -> Mapping[str, Rows]:
    """Read 12,000 phrases with their sentiment."""
    rows = whole_sst2(data)
    return {**rows, "train": rows["train"][:SST2_ROWS]}


def whole_sst2(data: Path) -> Mapping[str, Rows]:
    """Read 66,349 phrases; the published development sentences are the test rows."""
    columns = ("sentence", "label")
    rows = shuffled(read_table(data / "glue/SST-2/train.tsv", columns, delimiter="\t"))
    test = read_table(data / "glue/SST-2/dev.tsv", columns, delimiter="\t")
    return {"train": rows[VALIDATION_ROWS:], "validation": rows[:VALIDATION_ROWS], "test": test}


def read_table(path: Path, columns: tuple[str, str], *, delimiter: str = ",") -> Rows:
    """Read two columns of a file; files with tabs have no quotes."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
        return [(row[columns[0]].strip(), row[columns[1]]) for row in rows]


def shuffled(rows: Iterable[Any]) -> list[Any]:
    """Return the rows in an order that never changes."""
    order = list(rows)
    random.Random(0).shuffle(order)
    return order


_CLINC = (clinc150, ("clinc150/data_full.json",), 32)
_BANK = (banking77, ("banking77/train.csv", "banking77/test.csv"), 48)
_SST2 = (sst2, ("glue/SST-2/train.tsv", "glue/SST-2/dev.tsv"), 48)
_TABLE = (
    # data, labels, the teacher's steps and rate, rates of labels alone: whole and cut student
    ("clinc150-few", _CLINC, 1500, 640, 5e-4, 1e-3, 2e-3),
    ("banking77-few", _BANK, 1000, 640, 5e-4, 1e-3, 1e-3),
    ("sst2-few", _SST2, 500, 320, 1e-4, 3e-4, 3e-4),
    ("clinc150", _CLINC, None, 1600, 3e-4, 1e-3, 1e-3),
)
SETTINGS = {
    name: Setting(
        name=name,
        splits=splits,
        needs=needs,
        max_length=length,
        labels=labels,
        teacher=Learning(steps=steps, rate=rate),
        label_rate=label_rate,
        cut_label_rate=cut_rate,
    )
    for name, (splits, needs, length), labels, steps, rate, label_rate, cut_rate in _TABLE
}
PLANNED = tuple(SETTINGS)
"""Settings that are trained without being named."""
SETTINGS["clinc150-few-10-epochs"] = replace(
    SETTINGS["clinc150-few"],
    name="clinc150-few-10-epochs",
    # Ten times the 15,000 training rows.
    student=Learning(steps=4688, rate=1e-3),
    label_rate=4e-4,
)
SETTINGS["sst2"] = replace(
    SETTINGS["sst2-few"],
    name="sst2",
    splits=whole_sst2,
    labels=None,
    # Two epochs.
    teacher=Learning(steps=4146, rate=1e-4),
)
