"""Runs the teachers and the cells of the evidence: each has a folder of its own, and is done once.

A finished cell keeps its report, log and result; its models and checkpoints are removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
import random
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy.special import log_softmax

from evidence.cells import SAME_RUN, VERSION, Basis, Cell, Stored, TeacherGate
from evidence.comparisons import (
    BEST,
    COMPARISONS,
    Arm,
    Place,
    Trained,
    first_trial,
    teacher_sections,
)
from evidence.settings import SETTINGS, Config, Setting, read_table
from lib import launching
from lib.data import write_labelled
from megakd.storage.atomic import write_text

SAME_COST = 0.1
"""Two costs that differ by a smaller share count as equal."""
SCALED = ("student", "direct", "trial-", "leg-")
"""Names, or beginnings, of stages whose steps follow train.max_steps."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The folders of a run of the evidence."""

    data: Path
    out: Path
    encoder: str

    def folder(self, setting: Setting) -> Path:
        return self.out / setting.name


def digest(comparison: str, setting: Setting) -> str:
    """Return a digest of everything that the cells of a comparison in a setting depend on."""
    compared = COMPARISONS[comparison]
    place = Place(
        setting,
        models={name: f"teacher-{name}" for name in setting.pool},
        caches={name: f"cache-{name}" for name in setting.pool},
        details=lambda _: defaultdict(lambda: 1.0),
    )
    arms = {n: [arm.config(place), arm.steps] for n, arm in compared.arms_in(setting.name).items()}
    facts = [VERSION, comparison, setting.facts(), arms]
    text = json.dumps(facts, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def taught(bench: Bench, setting: Setting, name: str, seed: int) -> TeacherGate:
    """Train a teacher of a seed, unless that is done; return its scores.

    The folder then has `final/`, and `answers.npz` with its logits for the test rows.
    """
    folder = bench.folder(setting) / "teachers" / f"{name}-{seed}"
    sections = {
        "student": {"model": bench.encoder, "deepspeed": "zero0", "layers": setting.pool[name]},
        "method": {"name": "finetune"},
        "train": setting.teacher.train(),
    }
    labels = run_config(bench, setting, seed, sections, evaluations=6)
    config = labels | of_bootstrap(bench, setting, name, seed)

    def make() -> dict[str, Any]:
        if setting.bootstrap:
            write_bootstrap(labels, config)
        report = run_once(folder, config)
        scores = [100 * score for score in evaluations(folder, report["metric_name"])]
        final = score_teacher(folder, bench.folder(setting) / "data/test.csv", setting.max_length)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return {"teacher": name, "seed": seed, "scores": scores, "final": final}

    tree = once(folder / "gate.json", config, make)
    return TeacherGate(**tree | {"scores": tuple(tree["scores"])})


def of_bootstrap(bench: Bench, setting: Setting, name: str, seed: int) -> Config:
    """Return the sections of a teacher with rows and a seed of its own; else none."""
    if not setting.bootstrap:
        return {}
    rows = bench.folder(setting) / f"data/bootstrap-{name}-{seed}.csv"
    task = {**setting.task(bench.folder(setting) / "data"), "train_files": str(rows)}
    del task["labelled_examples"]
    return {"task": task, "seed": 100 * seed + [*setting.pool].index(name)}


def write_bootstrap(labels: Config, config: Config) -> None:
    """Write the rows of a teacher, drawn with replacement from the labelled rows of a run."""
    from megakd.config.file import load_config
    from megakd.data.splits import load_splits
    from megakd.inputs.run_data import cache_folder

    rows = Path(config["task"]["train_files"])
    path = launching.write_config(rows.with_suffix(".yaml"), {"output_dir": "-", **labels})
    run = load_config(path)
    splits = load_splits(run.task, seed=run.seed, cache_dir=cache_folder())
    given = zip(splits.train["text"], splits.train["label"], strict=True)
    labelled = [(text, splits.label_names[label]) for text, label in given if label >= 0]
    classes, source = {name for _, name in labelled}, random.Random(config["seed"])
    drawn: list[tuple[str, str]] = []
    while {name for _, name in drawn} != classes:  # a teacher without a class cannot be compared
        drawn = source.choices(labelled, k=len(labelled))
    write_labelled(rows, drawn)


def cached(bench: Bench, setting: Setting, names: tuple[str, ...], seed: int) -> None:
    """Write the answers of the teachers of a seed to all training rows, unless that is done."""
    folder = bench.folder(setting) / "caches" / str(seed)
    sections = {
        "student": {"model": bench.encoder, "layers": list(setting.student_layers)},
        "teachers": teacher_sections(place_of(bench, setting, seed, {}), names),
        "method": {"name": "mean_of_teachers"},
        "train": setting.student.train(),
    }
    config = run_config(bench, setting, seed, sections, evaluations=1)
    make = partial(start, folder, config, program="cache_teacher")
    once(folder / "caches.json", config, make)


def place_of(
    bench: Bench, setting: Setting, seed: int, finished: Mapping[str, Mapping[str, float]]
) -> Place:
    """Return the folders of a seed. finished: details of finished cells by arm."""
    folder = bench.folder(setting)
    return Place(
        setting,
        models={n: str(folder / "teachers" / f"{n}-{seed}" / "final") for n in setting.pool},
        caches={n: str(folder / "caches" / str(seed) / n) for n in setting.pool},
        details=finished.__getitem__,
    )


def run_cell(bench: Bench, comparison: Trained, cell: Planned) -> Cell:
    folder, arm = cell.folder, comparison.arms[cell.name]
    config = cell_config(bench, arm, cell)

    def make() -> dict[str, Any]:
        result = _result(bench, arm, cell, run_once(folder, config))
        for name in ("checkpoints", "stages", "final", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
        return dataclasses.asdict(result)

    return Cell(**once(folder / "cell.json", config, make))


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell before its run. steps: train.max_steps."""

    name: str
    seed: int
    basis: Any
    steps: int
    place: Place
    folder: Path


def cell_config(bench: Bench, arm: Arm, cell: Planned) -> Config:
    setting, sections = cell.place.setting, arm.config(cell.place)
    train = setting.student.train() | sections.get("train", {}) | {"max_steps": cell.steps}
    sections = {**sections, "train": train}
    return run_config(bench, setting, cell.seed, sections, evaluations=1)


def run_config(
    bench: Bench, setting: Setting, seed: int, sections: Config, *, evaluations: int
) -> Config:
    """Return the run config of a setting with sections of its own, without the output folder."""
    every = max(1, sections["train"]["max_steps"] // evaluations)
    return {
        "task": setting.task(bench.folder(setting) / "data"),
        "seed": seed,
        **sections,
        "eval": {"eval_steps": every, "per_device_eval_batch_size": 100},
        "save": {"save_steps": 10 * sections["train"]["max_steps"]},
        "log": {"logging_steps": 50, "report_to": []},
    }


def run_once(folder: Path, config: Config) -> dict[str, Any]:
    start(folder, config, program="train")
    return launching.read_report(folder)


def start(folder: Path, config: Config, *, program: str) -> None:
    """Run a command of `launch/` on one rank; output and times go to files of the folder.

    A folder that was begun with another config is removed first: the steps of a cell at equal cost
    follow measured costs, which more seeds change.
    """
    path, tree = folder / "evidence.yaml", {"output_dir": str(folder), **config}
    if path.is_file() and yaml.safe_load(path.read_text(encoding="utf-8")) != _plain(tree):
        shutil.rmtree(folder)
    launching.write_config(path, tree)
    command = launching.launch_command(program, path, 1, [])
    # Methods of the arms, by the names that the digests of the cells have.
    paths = [str(launching.BENCHMARKS / "evidence/plugins"), os.environ.get("PYTHONPATH", "")]
    plugins = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    environment = os.environ | launching.quickstart().ENVIRONMENT | plugins
    began = time.perf_counter()
    with (folder / "output.txt").open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=launching.ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.perf_counter() - began}
    (folder / "process.json").write_text(json.dumps(seconds), encoding="utf-8")
    if process.returncode != 0:
        raise launching.RunFailedError(
            f"{path}: exit code {process.returncode}; see {folder}/output.txt"
        )


def _result(bench: Bench, arm: Arm, cell: Planned, report: Mapping[str, Any]) -> Cell:
    setting, stages = cell.place.setting, report["stages"]
    process = json.loads((cell.folder / "process.json").read_text(encoding="utf-8"))
    busy = process["cpu"] / process["wall"]
    cpu = {stage["name"]: busy * stage["seconds"] for stage in stages}
    fixed = sum(seconds for name, seconds in cpu.items() if not name.startswith(SCALED))
    weights = {k: v for k, v in selected(cell.folder).items() if k != "value"}
    score, divergence = score_student(
        cell.folder / "final",
        Path(cell.place.models[BEST]).parent,
        bench.folder(setting) / "data/test.csv",
    )
    return Cell(
        arm=cell.name,
        seed=cell.seed,
        basis=cell.basis,
        score=score,
        divergence=divergence,
        steps=sum(stage["steps"] for stage in stages if stage["name"].startswith(SCALED)),
        cpu_seconds=sum(cpu.values()),
        teacher_rows=teacher_steps(report) * setting.student.rows if arm.asks_teachers else 0,
        max_steps=cell.steps,
        details={"fixed_cpu_seconds": fixed, **weights, **first_trial(report)},
    )


def evaluations(folder: Path, metric: str) -> list[float]:
    return [r[f"eval/{metric}"] for r in launching.records_of(folder) if f"eval/{metric}" in r]


def once(path: Path, config: Config, make: Callable[[], object]) -> dict[str, Any]:
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


def known_and_left(
    bench: Bench, stored: Stored, seeds: Sequence[int], arms: Sequence[str], basis: Basis
) -> tuple[list[Cell], list[Planned]]:
    known, left = list[Cell](), list[Planned]()
    for seed, arm in product(seeds, arms):
        if copy := copied(stored, arm, seed, basis):
            known.append(copy)
        elif run := planned(bench, stored, arm, seed, basis):
            done = stored_run(stored, run)
            if done is None:
                left.append(run)
            else:
                known.append(done)
    return known, left


def copied(stored: Stored, arm: str, seed: int, basis: Basis) -> Cell | None:
    """Return the cell of an arm whose run would be that of another arm; None for other arms."""
    planned = COMPARISONS[stored.comparison].arms[arm]
    cell = None if planned.after is None else stored.of(planned.after).get(seed)
    if cell is None or planned.same_as is None:
        return None
    details = {**cell.details, SAME_RUN: 1.0}
    is_same = planned.same_as(cell.details)
    return dataclasses.replace(cell, arm=arm, basis=basis, details=details) if is_same else None


def stored_run(stored: Stored, run: Planned) -> Cell | None:
    """Return the stored cell of a run; None if the run is still to be made.

    Runs of an arm and a seed differ in their steps alone, so that one run may serve both bases.
    """
    steps, cost = stored.of(run.name), stored.of(run.name, "cost")
    for cell in (steps.get(run.seed), cost.get(run.seed)):
        if cell is not None and cell.max_steps == run.steps:
            return dataclasses.replace(cell, basis=run.basis)
    return None


def planned(bench: Bench, stored: Stored, arm: str, seed: int, basis: Basis) -> Planned | None:
    """Return the cell of an arm and seed; None where an equal cost is not possible.

    A cell at equal cost has as many steps as make the training as long as that of the reference
    arm (see `cost_share`). What is trained before the student, such as a selector, is paid first.
    The reference arm itself has no such cell.
    """
    setting, comparison = SETTINGS[stored.setting], COMPARISONS[stored.comparison]
    steps = round(setting.student.steps * comparison.arms[arm].steps)
    if basis == "cost":
        share = cost_share(stored, arm, comparison.reference_of(arm, stored.arms()))
        if share is None or not comparison.arms[arm].at_equal_cost:
            return None
        # With a share of 1, the cell at equal steps is the cell at equal cost (see `stored_run`).
        steps = max(2, round(share * steps))
    finished = {one: stored.of(one).get(seed) for one in stored.arms()}
    details = {one: cell.details for one, cell in finished.items() if cell is not None}
    name = f"{arm}-{seed}-{basis}".replace(", ", "-").replace(" ", "_")
    return Planned(
        name=arm,
        seed=seed,
        basis=basis,
        steps=steps,
        place=place_of(bench, setting, seed, details),
        folder=bench.folder(setting) / stored.comparison / name,
    )


def cost_share(stored: Stored, arm: str, reference: str) -> float | None:
    """Return the share of an arm's steps that costs as much as the reference arm.

    The median over all seeds, because the CPU time of the same training differs by a tenth from run
    to run on a machine with other work. None for the reference arm, and for an arm that costs too
    much before the student's first step. 1 for an arm of nearly the same cost.
    """
    ours, theirs = stored.of(arm), stored.of(reference)
    seeds = ours.keys() & theirs.keys()
    if arm == reference or not seeds:
        return None
    ratios, shares = list[float](), list[float]()
    for seed in seeds:
        cost, aim = ours[seed].cpu_seconds, theirs[seed].cpu_seconds
        fixed = ours[seed].details.get("fixed_cpu_seconds", 0.0)
        ratios.append(cost / aim)
        shares.append((aim - fixed) / (cost - fixed))
    if abs(median(ratios) - 1) < SAME_COST:
        return 1.0
    share = median(shares)
    return share if share > SAME_COST else None


def selected(output: Path) -> dict[str, float]:
    """Return the mean weight of each kind of knowledge over the student's steps in a run."""
    logged = defaultdict[str, list[float]](list)
    for record in launching.records_of(output):
        for key, value in record.items() if record["stage"] == "student" else ():
            if key.startswith("select/"):
                logged[key.removeprefix("select/")].append(value)
    return {kind: sum(values) / len(values) for kind, values in logged.items()}


def teacher_steps(report: Mapping[str, Any]) -> int:
    """Return the steps in which a teacher answered, counted once per teacher.

    The steps of pilots and selectors are included.
    """
    steps = sum(stage["steps"] for stage in report["stages"])
    if not report["pool"]:
        return steps
    students = sum(stage["steps"] for stage in report["stages"] if stage["name"] == "student")
    return steps - students + sum(one["steps"] for one in report["pool"])


ANSWERS = "answers.npz"
LOADING = threading.Lock()
"""Two cells may end at the same time, and `from_pretrained` may not run in two threads at once."""


class Answered(NamedTuple):
    """The answers of a classifier. logits: [N, C]. labels: names of the C classes, in order."""

    logits: np.ndarray
    labels: Sequence[str]


def answers_of(model: Path, texts: Sequence[str], max_length: int) -> Answered:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with LOADING:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
        network = AutoModelForSequenceClassification.from_pretrained(model, trust_remote_code=True)
    network.eval()
    rows = []
    with torch.inference_mode():
        for first in range(0, len(texts), 100):
            some = list(texts[first : first + 100])
            options = {"padding": True, "truncation": True, "max_length": max_length}
            batch = tokenizer(some, **options, return_tensors="pt")
            rows.append(network(**batch).logits.float().numpy())
    names = network.config.id2label
    return Answered(np.concatenate(rows), [names[number] for number in range(len(names))])


def test_rows(path: Path) -> tuple[list[str], list[str]]:
    rows = read_table(path, ("text", "label"), delimiter=",")
    return [text for text, _ in rows], [label for _, label in rows]


def accuracy(answered: Answered, labels: Sequence[str]) -> float:
    """Return the share of rows whose most likely class is the label, in points."""
    names = (answered.labels[number] for number in answered.logits.argmax(axis=-1))
    return 100 * sum(map(operator.eq, names, labels)) / len(labels)


def score_teacher(folder: Path, rows: Path, max_length: int) -> float:
    """Return the accuracy of the model in `final/`; write its logits next to the model."""
    texts, labels = test_rows(rows)
    answered = answers_of(folder / "final", texts, max_length)
    np.savez(folder / ANSWERS, logits=answered.logits, max_length=max_length)
    return accuracy(answered, labels)


def score_student(student: Path, teacher: Path, rows: Path) -> tuple[float, float]:
    """Return the accuracy of a student, and the mean KL(teacher || student) in nats."""
    stored, (texts, labels) = np.load(teacher / ANSWERS), test_rows(rows)
    answered = answers_of(student, texts, int(stored["max_length"]))
    return accuracy(answered, labels), mean_divergence(stored["logits"], answered.logits)


def mean_divergence(teacher: np.ndarray, student: np.ndarray) -> float:
    """Return the mean KL(softmax(teacher) || softmax(student)) in nats. Both [N, C]."""
    target, ours = (
        log_softmax(logits.astype(np.float64), axis=-1) for logits in (teacher, student)
    )
    return float((np.exp(target) * (target - ours)).sum(axis=-1).mean())
