"""Trains the teachers and the cells of the evidence: each has a folder, and is done once.

A cell is one run of one arm with one seed. A finished cell keeps its report, log and result; its
models and checkpoints are removed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import yaml
from scipy.special import log_softmax

from evidence.comparisons import BEST, Arm, Comparison, Place, teacher_section
from evidence.settings import POOL, STUDENT_LAYERS, Setting, read_table
from lib import launching
from lib.data import Config
from megakd.process.files import write_text

Basis = Literal["steps", "cost"]
"""What an arm has in common with the reference: the student's steps, or the total cost."""
SAME_COST = 0.1
"""Two costs that differ by a smaller share count as equal."""
SCALED = ("student", "direct", "trial-", "leg-")
"""Names, or beginnings, of stages whose steps follow train.max_steps."""
ANSWERS = "answers.npz"
LOADING = threading.Lock()
"""Two cells may end at the same time, and `from_pretrained` may not run in two threads at once."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The result of one run.

    score: accuracy on the test rows, in points. divergence: KL(best teacher || student) on the
        test rows, in nats per row.
    steps: of the student and its trials; of MaxiDisc, of all its legs and students.
    cpu_seconds: of all training of the run, also of trials and selectors, without the teachers that
        exist before.
    details: numbers of the arm, such as the mean weights of a selector.
    """

    arm: str
    seed: int
    basis: Basis
    score: float
    divergence: float
    steps: int
    cpu_seconds: float
    details: Mapping[str, float] = field(default_factory=dict)


Cells = Mapping[tuple[str, int, Basis], Cell]
"""By arm, seed and basis."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Folder of a setting in a run of the evidence, and the pretrained encoder of all models."""

    setting: Setting
    folder: Path
    encoder: str

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def place(self, seed: int, cells: Cells) -> Place:
        return Place(
            self.setting,
            models={n: str(self.folder / "teachers" / f"{n}-{seed}" / "final") for n in POOL},
            caches={n: str(self.folder / "caches" / str(seed) / n) for n in POOL},
            details={
                c.arm: c.details for c in cells.values() if (c.seed, c.basis) == (seed, "steps")
            },
        )

    def config(self, seed: int, sections: Config, *, evaluations: int = 1) -> Config:
        """Return a run config with sections of its own, without the output folder."""
        steps = sections["train"]["max_steps"]
        return {
            "task": self.setting.task(self.data),
            "seed": seed,
            **sections,
            "eval": {"eval_steps": max(1, steps // evaluations), "per_device_eval_batch_size": 100},
            "save": {"save_steps": 10 * steps},
            "log": {"logging_steps": 50, "report_to": []},
        }


def taught(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """Train a teacher of a seed, unless that is done; return its scores in points.

    `validation` are the scores during its training, `test` is the score of its end. The folder has
    `final/`, and `answers.npz` with its logits for the test rows.
    """
    folder, setting = bench.folder / "teachers" / f"{name}-{seed}", bench.setting
    sections = {
        "student": {"model": bench.encoder, "deepspeed": "zero0", "layers": POOL[name]},
        "method": {"name": "finetune"},
        "train": setting.teacher.train(),
    }
    config = bench.config(seed, sections, evaluations=6)

    def make() -> dict[str, Any]:
        start(folder, config, program="train")
        key = f"eval/{launching.read_report(folder)['metric_name']}"
        scores = [100 * r[key] for r in launching.records_of(folder) if key in r]
        texts, labels = test_rows(bench)
        logits, names = answers_of(folder / "final", texts, setting.max_length)
        np.savez(folder / ANSWERS, logits=logits)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        test = accuracy(logits, names, labels)
        return {"teacher": name, "seed": seed, "validation": scores, "test": test}

    return once(folder / "teacher.json", config, make)


def cached(bench: Bench, names: Sequence[str], seed: int) -> None:
    """Write the answers of the teachers of a seed to all training rows, unless that is done."""
    folder, place = bench.folder / "caches" / str(seed), bench.place(seed, {})
    sections = {
        "student": {"model": bench.encoder, "layers": list(STUDENT_LAYERS)},
        "teachers": [{"name": name, **teacher_section(place, name)} for name in names],
        "method": {"name": "mean_of_teachers"},
        "train": bench.setting.student.train(),
    }
    config = bench.config(seed, sections)
    once(folder / "caches.json", config, partial(start, folder, config, program="cache_teacher"))


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell before its run. steps: `train.max_steps`."""

    arm: str
    seed: int
    basis: Basis
    steps: int
    config: Config
    folder: Path


def planned(
    bench: Bench, comparison: Comparison, cells: Cells, which: tuple[str, int, Basis]
) -> Planned | None:
    """Return the cell of an arm and seed; None where an equal cost is not possible.

    A cell at equal cost has as many steps as make the training as long as that of the reference
    (see `cost_share`). What is trained before the student, such as a selector, is paid first.
    """
    name, seed, basis = which
    arm, setting = comparison.arms[name], bench.setting
    steps = round(setting.student.steps * arm.steps)
    if basis == "cost":
        share = cost_share(cells, name, comparison.reference_of(name))
        if share is None:
            return None
        # With a share of 1, the run at equal steps is the run at equal cost.
        steps = max(2, round(share * steps))
    # Runs of an arm and a seed differ in their steps alone.
    folder = bench.folder / "cells" / f"{name}-{seed}-{steps}".replace(", ", "-").replace(" ", "_")
    config = cell_config(bench, arm, steps, seed, cells)
    return Planned(arm=name, seed=seed, basis=basis, steps=steps, config=config, folder=folder)


def cell_config(bench: Bench, arm: Arm, steps: int, seed: int, cells: Cells) -> Config:
    sections = arm.config(bench.place(seed, cells))
    train = bench.setting.student.train() | sections.get("train", {}) | {"max_steps": steps}
    return bench.config(seed, {**sections, "train": train})


def cost_share(cells: Cells, arm: str, reference: str) -> float | None:
    """Return the share of an arm's steps that costs as much as the reference arm.

    The median over all seeds, because the CPU time of the same training differs by a tenth from run
    to run on a machine with other work. None for the reference arm, and for an arm that costs too
    much before the student's first step. 1 for an arm of nearly the same cost.
    """
    ratios, shares = list[float](), list[float]()
    for (name, seed, basis), cell in cells.items():
        other = cells.get((reference, seed, "steps"))
        if name == arm != reference and basis == "steps" and other is not None:
            fixed = cell.details.get("fixed_cpu_seconds", 0.0)
            ratios.append(cell.cpu_seconds / other.cpu_seconds)
            shares.append((other.cpu_seconds - fixed) / (cell.cpu_seconds - fixed))
    if not ratios:
        return None
    if abs(median(ratios) - 1) < SAME_COST:
        return 1.0
    share = median(shares)
    return share if share > SAME_COST else None


def run_cell(bench: Bench, cell: Planned) -> Cell:
    def make() -> dict[str, Any]:
        start(cell.folder, cell.config, program="train")
        result = _result(bench, cell, launching.read_report(cell.folder))
        for name in ("checkpoints", "stages", "final", "tensorboard"):
            shutil.rmtree(cell.folder / name, ignore_errors=True)
        return dataclasses.asdict(result)

    result = Cell(**once(cell.folder / "cell.json", cell.config, make))
    return dataclasses.replace(result, basis=cell.basis)


def start(folder: Path, config: Config, *, program: str) -> None:
    """Run a command of `launch/` on one rank; output and times go to files of the folder.

    A folder that was begun with another config is removed first.
    """
    path, tree = folder / "evidence.yaml", {"output_dir": str(folder), **config}
    if path.is_file() and yaml.safe_load(path.read_text(encoding="utf-8")) != _plain(tree):
        shutil.rmtree(folder)
    launching.write_config(path, tree)
    # The method of an arm is found here.
    paths = [str(launching.BENCHMARKS / "evidence/plugins"), os.environ.get("PYTHONPATH", "")]
    plugins = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    with (folder / "output.txt").open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            launching.launch_command(program, path, 1, []),
            cwd=launching.ROOT,
            env=os.environ | launching.quickstart().ENVIRONMENT | plugins,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.perf_counter() - began}
    (folder / "process.json").write_text(json.dumps(seconds), encoding="utf-8")
    if process.returncode != 0:
        raise launching.RunFailedError(
            f"{path}: exit code {process.returncode}; see {folder}/output.txt"
        )


def _result(bench: Bench, cell: Planned, report: Mapping[str, Any]) -> Cell:
    process = json.loads((cell.folder / "process.json").read_text(encoding="utf-8"))
    busy = process["cpu"] / process["wall"]
    cpu = {stage["name"]: busy * stage["seconds"] for stage in report["stages"]}
    fixed = sum(seconds for name, seconds in cpu.items() if not name.startswith(SCALED))
    texts, labels = test_rows(bench)
    logits, names = answers_of(cell.folder / "final", texts, bench.setting.max_length)
    answers = bench.folder / "teachers" / f"{BEST}-{cell.seed}" / ANSWERS
    return Cell(
        arm=cell.arm,
        seed=cell.seed,
        basis=cell.basis,
        score=accuracy(logits, names, labels),
        divergence=mean_divergence(np.load(answers)["logits"], logits),
        steps=sum(s["steps"] for s in report["stages"] if s["name"].startswith(SCALED)),
        cpu_seconds=sum(cpu.values()),
        details={"fixed_cpu_seconds": fixed, **selected(cell.folder)},
    )


def selected(output: Path) -> dict[str, float]:
    """Return the mean weight of each kind of knowledge over the student's steps in a run."""
    logged = defaultdict[str, list[float]](list)
    for record in launching.records_of(output):
        for key, value in record.items() if record["stage"] == "student" else ():
            if key.startswith("select/") and key != "select/value":
                logged[key.removeprefix("select/")].append(value)
    return {kind: sum(values) / len(values) for kind, values in logged.items()}


def once(path: Path, config: Config, make: Callable[[], Any]) -> dict[str, Any]:
    """Return the result of a config, which is made unless it is stored."""
    if path.is_file():
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["config"] == _plain(config):
            return tree["result"]
    result = make()
    write_text(path, json.dumps({"config": _plain(config), "result": result}, indent=1))
    return _plain(result or {})


def _plain(tree: Any) -> Any:
    return json.loads(json.dumps(tree))


def test_rows(bench: Bench) -> tuple[list[str], list[str]]:
    rows = read_table(bench.data / "test.csv", ("text", "label"))
    return [text for text, _ in rows], [label for _, label in rows]


def answers_of(model: Path, texts: Sequence[str], length: int) -> tuple[np.ndarray, list[str]]:
    """Return the logits [N, C] of a classifier, and the names of its C classes in order."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with LOADING:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
        network = AutoModelForSequenceClassification.from_pretrained(model, trust_remote_code=True)
    network.eval()
    rows, options = [], {"padding": True, "truncation": True, "max_length": length}
    with torch.inference_mode():
        for first in range(0, len(texts), 100):
            batch = tokenizer(list(texts[first : first + 100]), **options, return_tensors="pt")
            rows.append(network(**batch).logits.float().numpy())
    names = network.config.id2label
    return np.concatenate(rows), [names[number] for number in range(len(names))]


def accuracy(logits: np.ndarray, names: Sequence[str], labels: Sequence[str]) -> float:
    """Return the share of rows whose most likely class is the label, in points."""
    best = [names[number] for number in logits.argmax(axis=-1)]
    return 100 * sum(ours == label for ours, label in zip(best, labels, strict=True)) / len(labels)


def mean_divergence(teacher: np.ndarray, student: np.ndarray) -> float:
    """Return the mean KL(softmax(teacher) || softmax(student)) in nats. Both [N, C]."""
    target, ours = (log_softmax(one.astype(np.float64), axis=-1) for one in (teacher, student))
    return float((np.exp(target) * (target - ours)).sum(axis=-1).mean())
