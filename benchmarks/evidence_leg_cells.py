"""Cells of the evidence from the reports of the benchmarks that train their arms themselves.

An arm whose runs have not finished for a seed has no cell with this seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import homodistil_summary
import mixed_vocabulary_summary
from evidence_cells import Cell
from evidence_others import COLLECTED
from homodistil_summary import ALONE, BASELINES, CUBIC, ONE_SHOT_ALONE, RANDOM
from mixed_vocabulary_cases import PATIENT_KD
from shrink_summary import cut_loss, layers_of, stage

if TYPE_CHECKING:
    from collections.abc import Container, Iterable
    from pathlib import Path

Report = Mapping[str, Any]
Reports = dict[str, Report | None]
"""By name of the run; None of a run that has not finished."""
LossOf = Callable[[homodistil_summary.Found, str, int], float | None]
KL = "soft_target_kl"
STUDENT, TEACHER_STAGE = "student", "mixed-teacher"


def processors(report: Report) -> int:
    """Return the number of threads that a run trained with, over all ranks."""
    return report["environment"]["ranks"] * report["environment"]["threads"]


def mixed_vocabulary_cells(
    found: mixed_vocabulary_summary.Found, *, task: str | None, rows: int
) -> list[Cell]:
    """Return the cells on text, or on a task that the students learned after the text.

    Args:
        found: the reports.
        task: name of the task; None: text.
        rows: of a step on text, over all ranks.
    """
    arms = COLLECTED["mixed_vocabulary"].arms
    cells = (_mixed(found, arm, seed, task, rows) for arm in arms for seed in found.seeds)
    return [cell for cell in cells if cell is not None]


def _mixed(
    found: mixed_vocabulary_summary.Found, arm: str, seed: int, task: str | None, rows: int
) -> Cell | None:
    report = found.on_text(arm, seed)
    tuned = None if task is None else found.reports.get(f"{task}-{arm}-{seed}")
    if report is None or (task is not None and tuned is None):
        return None
    score = None if task is None else found.score(task, arm, seed)
    steps = {one["name"]: one["steps"] for one in report["stages"]}
    learned = steps[PATIENT_KD if arm == PATIENT_KD else STUDENT]
    # In version 1 the teacher reads the rows beside the student, in version 2 before the student.
    asked = 0 if arm == ALONE else steps.get(TEACHER_STAGE, learned)
    seconds = mixed_vocabulary_summary.seconds(report, arm) * processors(report)
    return Cell(
        arm=arm,
        seed=seed,
        basis="steps",
        score=mixed_vocabulary_summary.nats(report, arm) if score is None else score,
        divergence=None,
        steps=learned + (0 if tuned is None else stage(tuned, STUDENT)["steps"]),
        cpu_seconds=seconds + (0.0 if tuned is None else _all_seconds(tuned)),
        teacher_rows=asked * rows,
    )


def homodistil_cells(found: homodistil_summary.Found, loss_of: LossOf, *, rows: int) -> list[Cell]:
    """Return the cells on held-out text, at equal steps.

    Args:
        found: the reports.
        loss_of: the held-out loss of a variant with a seed; None if its run has not finished.
        rows: of a step, over all ranks.
    """
    cells = list[Cell]()
    for arm, seed in itertools.product(COLLECTED["homodistil"].arms, found.seeds):
        report, score = found.pruning(arm, seed), loss_of(found, arm, seed)
        if report is not None and score is not None:
            cells.append(_pruned(arm, seed, report, score, rows=rows))
    return cells


def homodistil_cost_cells(
    cells: Iterable[Cell], longer: Iterable[Cell], arms: Container[str]
) -> list[Cell]:
    """Return the cells at equal cost; the method and `random` have none.

    Args:
        cells: at equal steps.
        longer: of the runs that learned for as long as the method.
        arms: that have such runs; the other arms cost as much as the method at equal steps.
    """
    same = [cell for cell in cells if cell.arm not in (CUBIC, RANDOM) and cell.arm not in arms]
    found = [*same, *(cell for cell in longer if cell.arm in arms)]
    return [dataclasses.replace(cell, basis="cost") for cell in found]


def _pruned(arm: str, seed: int, report: Report, score: float, *, rows: int) -> Cell:
    steps = sum(one["steps"] for one in homodistil_summary.stages_of(report, arm))
    return Cell(
        arm=arm,
        seed=seed,
        basis="steps",
        score=score,
        divergence=stage(report, arm if arm in BASELINES else STUDENT)["metrics"].get(KL),
        steps=steps,
        cpu_seconds=homodistil_summary.seconds_of(report, arm) * processors(report),
        teacher_rows=0 if arm in (ALONE, ONE_SHOT_ALONE) else steps * rows,
    )


def on_policy_cell(
    arm: str, seed: int, report: Report, scored: Mapping[str, float], *, rows: int
) -> Cell:
    """Return the cell of a student.

    Args:
        arm: of the comparison.
        seed: of the run.
        report: of the run.
        scored: the last evaluation on held-out prompts.
        rows: of a step.
    """
    steps = stage(report, STUDENT)["steps"]
    return Cell(
        arm=arm,
        seed=seed,
        basis="steps",
        score=100 * scored["eval/match"],
        divergence=scored.get(f"eval/{KL}"),
        steps=steps,
        cpu_seconds=_all_seconds(report),
        teacher_rows=0 if report["teacher"] is None else steps * rows,
    )


def shrink_cells(reports: Reports, seed: int, *, metrics: Path, rows: int) -> list[Cell]:
    """Return the cells of a seed.

    Args:
        reports: of the runs of the seed, by name in the benchmark.
        seed: of the runs.
        metrics: log of the run `shrink`.
        rows: of a step.
    """
    of_runs = {
        arm: _shrunk(arm, seed, report, rows)
        for arm, name in COLLECTED["shrink"].arms.items()
        if (report := reports.get(name)) is not None
    }
    report = reports["shrink"]
    if report is None:
        return [*of_runs.values()]
    before = {"loss before repair": cut_loss(metrics, chosen_layers(report))}
    shrink = of_runs["shrink"]
    of_runs["shrink"] = dataclasses.replace(shrink, details={**shrink.details, **before})
    return [*of_runs.values(), _from_random_weights(seed, report, rows)]


def _shrunk(arm: str, seed: int, report: Report, rows: int) -> Cell:
    """Return the cell of a run, without its baseline."""
    own = [one for one in report["stages"] if one["name"] not in report["baselines"]]
    steps = sum(one["steps"] for one in own)
    return Cell(
        arm=arm,
        seed=seed,
        basis="steps",
        score=report[STUDENT]["metrics"]["loss"],
        divergence=None,
        steps=steps,
        cpu_seconds=_seconds(own) * processors(report),
        teacher_rows=steps * rows,
        details={"layers": chosen_layers(report)},
    )


def _from_random_weights(seed: int, report: Report, rows: int) -> Cell:
    trained = stage(report, "random")
    return Cell(
        arm="random weights",
        seed=seed,
        basis="steps",
        score=report["baselines"]["random"]["loss"],
        divergence=None,
        steps=trained["steps"],
        cpu_seconds=trained["seconds"] * processors(report),
        teacher_rows=trained["steps"] * rows,
    )


def chosen_layers(report: Report) -> int:
    """Return the number of layers of the candidate that a trial has chosen."""
    (chosen,) = [layers_of(row) for row in report["candidates"] if row["chosen"]]
    return chosen


def logged(folder: Path, key: str) -> list[float]:
    """Return the values of a key in the log of a run, in order; empty without a log."""
    log = folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [record[key] for record in map(json.loads, lines) if key in record]


def _all_seconds(report: Report) -> float:
    return _seconds(report["stages"]) * processors(report)


def _seconds(stages: Iterable[Mapping[str, Any]]) -> float:
    return sum(one["seconds"] for one in stages)
