"""Stores the runs of other benchmarks, such as `methods.shrink`, as cells of the evidence.

`python benchmarks evidence --collect homodistil-stories260K runs/bench/homodistil/decoder` reads
the reports in `RUN-SEED/` of a folder and replaces the cells of their arms and seeds in a file of
notebook/evidence/, whose other facts stay. It starts no run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from evidence.cells import Cell, Stored, read_stored, with_cells, write_stored
from evidence.others import COLLECTED
from lib.books import HELD_OUT
from lib.data import TASKS
from lib.launching import Report, UnusableError, metric_of, read_report
from lib.tables import machine

STUDENT = "student"


def collect(path: Path, folder: Path) -> None:
    """Replace stored cells by those of the finished runs below a folder, on both bases."""
    stored = read_stored(path)
    arms = COLLECTED[stored.comparison].arms
    made = [cell for arm in arms for cell in _cells(stored, folder, arm)]
    if not made:
        raise UnusableError(f"{folder} has no finished run of {stored.comparison}")
    again = {(cell.arm, cell.seed) for cell in made}
    kept = [cell for cell in stored.cells if (cell.arm, cell.seed) not in again]
    for arm in dict.fromkeys(cell.arm for cell in kept):
        print(f"{path}: no run of {arm} with some seeds; its stored cells stay", flush=True)
    stored = dataclasses.replace(stored, cells=tuple(kept), machine=machine())
    write_stored(path.parent, with_cells(stored, made))


def _cells(stored: Stored, folder: Path, arm: str) -> Iterator[Cell]:
    """Yield the cells of an arm by seed; on a task, of the runs whose student has learned it."""
    comparison = COLLECTED[stored.comparison]
    run, model = comparison.baselines.get(arm, (comparison.runs.get(arm, arm), STUDENT))
    for path in sorted(folder.glob(f"{run}-*/report.json")):
        named, report = re.fullmatch(rf"{run}-(\d+)", path.parent.name), read_report(path.parent)
        if named is None or not _stages_of(report, model):
            continue
        cell = _cell(stored, path.parent, (arm, model), int(named[1]))
        after = folder / f"{stored.setting}-{arm}-{cell.seed}"
        if stored.setting not in TASKS:
            yield cell
        elif (after / "report.json").is_file():
            yield _after_task(cell, read_report(after))


def _cell(stored: Stored, run: Path, which: tuple[str, str], seed: int) -> Cell:
    (arm, model), report = which, read_report(run)
    stages = _stages_of(report, model)
    # The teacher of version 2 reads the rows in a stage before its student.
    before = sum(stage["steps"] for stage in stages if stage["name"] == "mixed-teacher")
    steps = sum(stage["steps"] for stage in stages) - before
    metric = "nats_per_character" if "per character" in stored.metric else "loss"
    has_teacher = arm not in COLLECTED[stored.comparison].no_teacher
    train = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["train"]
    rows = train["per_device_train_batch_size"] * train.get("gradient_accumulation_steps", 1)
    rows *= report["environment.ranks"]  # of an optimizer step
    return Cell(
        arm=arm,
        seed=seed,
        basis="steps",
        score=metric_of(report, model, metric, HELD_OUT),
        divergence=stages[-1].get("soft_target_kl"),
        steps=steps,
        cpu_seconds=_cpu_seconds(report, stages),
        teacher_rows=(before or steps) * rows if has_teacher else 0,
    )


def _stages_of(report: Report, model: str) -> list[Report]:
    """Return the stages of a baseline, or all stages of the student, with those before it."""
    if model != STUDENT:
        return [stage for stage in report["stages"] if stage["name"] == model]
    return [stage for stage in report["stages"] if stage["name"] not in report["baselines"]]


def _cpu_seconds(report: Report, stages: Sequence[Report]) -> float:
    """Return the time of stages on all threads of all ranks."""
    threads = report["environment.ranks"] * report["environment.threads"]
    return threads * sum(stage["seconds"] for stage in stages)


def _after_task(cell: Cell, report: Report) -> Cell:
    """Return a cell on text with the score, steps and time of the task that is learned after it."""
    return dataclasses.replace(
        cell,
        score=100 * report[f"student.{report['metric_name']}"],
        divergence=None,
        steps=cell.steps + sum(stage["steps"] for stage in report["stages"]),
        cpu_seconds=cell.cpu_seconds + _cpu_seconds(report, report["stages"]),
    )
