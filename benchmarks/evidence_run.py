"""Runs the teachers and the cells of the evidence: each has a folder of its own, and is done once.

A finished cell keeps its report, log and result; its models and checkpoints are removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from evidence_arms import Arm, Place, Trained
from evidence_cells import VERSION, Cell, TeacherGate
from evidence_comparisons import BEST, COMPARISONS, teacher_sections
from evidence_reports import first_trial, selected, teacher_steps
from evidence_scores import score_student, score_teacher
from evidence_settings import Config, Setting
from launching import ROOT, RunFailedError, launch_command, quickstart, write_config

TEACHER_EVALUATIONS, STUDENT_EVALUATIONS = 6, 1
SCALED = ("student", "direct", "trial-", "leg-")
"""Names, or beginnings, of stages whose steps follow train.max_steps."""
REMOVED = ("checkpoints", "stages", "final", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The folders of a run of the evidence."""

    data: Path
    out: Path
    encoder: str

    def folder(self, setting: Setting) -> Path:
        """Return the folder of a setting."""
        return self.out / setting.name


def digest(comparison: str, setting: Setting) -> str:
    """Return a digest of everything that the cells of a comparison in a setting depend on."""
    found = COMPARISONS[comparison]
    place = Place(
        setting,
        models={name: f"teacher-{name}" for name in setting.pool},
        caches={name: f"cache-{name}" for name in setting.pool},
        details=lambda _: defaultdict(lambda: 1.0),
    )
    arms = {n: [arm.config(place), arm.steps] for n, arm in found.arms_in(setting.name).items()}
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
    stored = folder / "gate.json"
    config = run_config(bench, setting, seed, sections, evaluations=TEACHER_EVALUATIONS)
    if not is_done(stored, config):
        report = run_once(folder, config)
        scores = [100 * score for score in evaluations(folder, report["metric_name"])]
        final = score_teacher(folder, bench.folder(setting) / "data/test.csv", setting.max_length)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        gate = TeacherGate(teacher=name, seed=seed, scores=tuple(scores), final=final)
        write_done(stored, config, dataclasses.asdict(gate))
    tree = read_done(stored)
    return TeacherGate(**tree | {"scores": tuple(tree["scores"])})


def cached(bench: Bench, setting: Setting, names: tuple[str, ...], seed: int) -> None:
    """Write the answers of the teachers of a seed to all training rows, unless that is done."""
    place = place_of(bench, setting, seed, {})
    folder = bench.folder(setting) / "caches" / str(seed)
    sections = {
        "student": {"model": bench.encoder, "layers": list(setting.student_layers)},
        "teachers": teacher_sections(place, names),
        "method": {"name": "mean_of_teachers"},
        "train": setting.student.train(),
    }
    config = run_config(bench, setting, seed, sections, evaluations=1)
    if not is_done(folder / "caches.json", config):
        start(folder, config, program="cache_teacher")
        write_done(folder / "caches.json", config, {})


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
    """Run a cell, unless that is done, and return its result."""
    folder, arm = cell.folder, comparison.arms[cell.name]
    stored = folder / "cell.json"
    config = cell_config(bench, arm, cell)
    if not is_done(stored, config):
        report = run_once(folder, config)
        result = _result(bench, arm, cell, report)
        for name in REMOVED:
            shutil.rmtree(folder / name, ignore_errors=True)
        write_done(stored, config, dataclasses.asdict(result))
    return Cell(**read_done(stored))


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
    """Return the run config of a cell, without the output folder."""
    setting, sections = cell.place.setting, arm.config(cell.place)
    train = setting.student.train() | sections.get("train", {}) | {"max_steps": cell.steps}
    sections = {**sections, "train": train}
    return run_config(bench, setting, cell.seed, sections, evaluations=STUDENT_EVALUATIONS)


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
    """Run a config in its folder and return the report.

    Raises:
        RunFailedError: the command failed, or ended without a report.
    """
    start(folder, config, program="train")
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def start(folder: Path, config: Config, *, program: str) -> None:
    """Run a command of `launch/` on one rank; output and times go to files of the folder.

    A folder that was begun with another config is removed first: the steps of a cell at equal cost
    follow measured costs, which more seeds change.

    Raises:
        RunFailedError: the command failed.
    """
    path, tree = folder / "evidence.yaml", {"output_dir": str(folder), **config}
    if path.is_file() and yaml.safe_load(path.read_text(encoding="utf-8")) != _plain(tree):
        shutil.rmtree(folder)
    write_config(path, tree)
    command = launch_command(program, path, 1, [])
    paths = [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    plugins = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment = os.environ | quickstart().ENVIRONMENT | plugins
    began = time.perf_counter()
    with (folder / "output.txt").open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.perf_counter() - began}
    (folder / "process.json").write_text(json.dumps(seconds), encoding="utf-8")
    if process.returncode != 0:
        raise RunFailedError(f"{path}: exit code {process.returncode}; see {folder}/output.txt")


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
    """Return the validation scores of the evaluations of a student, in order."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [r[f"eval/{metric}"] for r in records if f"eval/{metric}" in r]


def is_done(path: Path, config: Config) -> bool:
    """Return whether a result of the same config is stored."""
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["config"] == _plain(
        config
    )


def write_done(path: Path, config: Config, result: Mapping[str, Any]) -> None:
    """Store a result with its config, whole or not at all."""
    from megakd.storage.atomic import write_text

    write_text(path, json.dumps({"config": _plain(config), "result": result}, indent=1))


def read_done(path: Path) -> dict[str, Any]:
    """Return a stored result."""
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def _plain(config: Config) -> Config:
    return json.loads(json.dumps(config))
