"""Summary of the cells of `teachers.py`: a table, and Markdown rows."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from machine import markdown_row, mean_and_deviation
from summary import aligned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class Cell(NamedTuple):
    """One run: its score in points on the report's split, and what it took.

    steps: of whatever learned. teacher_steps: how often a teacher was asked about a step's rows.
    selected: how a selector weighed the kinds of knowledge, the mean over the student's steps.
    """

    task: str
    seed: int
    name: str
    score: float
    steps: int
    teacher_steps: int
    seconds: float
    selected: Mapping[str, float] = MappingProxyType({})


def cell_of(task: str, seed: int, name: str, report: Mapping[str, Any]) -> Cell:
    """Return the results of a cell from its report."""
    stages = report["stages"]
    return Cell(
        task,
        seed,
        name,
        100 * report["student"]["metrics"][report["metric_name"]],
        sum(stage["steps"] for stage in stages),
        teacher_steps(report),
        sum(stage["seconds"] for stage in stages),
    )


def selected(output: Path) -> dict[str, float]:
    """The mean weight of each kind of knowledge over the student's steps; empty: none were chosen.

    Args:
        output: of the run.
    """
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    logged: dict[str, list[float]] = {}
    for key, value in (item for r in records if r["stage"] == "student" for item in r.items()):
        if key.startswith("select/"):
            logged.setdefault(key.removeprefix("select/"), []).append(value)
    return {kind: sum(values) / len(values) for kind, values in logged.items()}


def teacher_steps(report: Mapping[str, Any]) -> int:
    """Steps that a teacher answered in, counted once per teacher; pilots and selectors included."""
    taught = [stage for stage in report["stages"] if report["teacher"] is not None]
    others = sum(stage["steps"] for stage in taught if stage["name"] != "student")
    if report["pool"] is not None:
        return others + sum(one["steps"] for one in report["pool"]["teachers"])
    return others + sum(stage["steps"] for stage in taught if stage["name"] == "student")


def _groups(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.task, cell.name), []).append(cell)
    return found


def table(cells: Sequence[Cell]) -> str:
    """Return a line per task and method: mean and deviation over the seeds, and the time."""
    lines = [["task", "method", "seeds", "mean", "sd", "steps", "teacher steps", "seconds"]]
    for (task, name), group in _groups(cells).items():
        mean, deviation = mean_and_deviation([cell.score for cell in group])
        seconds = mean_and_deviation([cell.seconds for cell in group])[0]
        took = [str(group[0].steps), str(group[0].teacher_steps), f"{seconds:.0f}"]
        lines.append([task, name, str(len(group)), f"{mean:.2f}", f"{deviation:.2f}", *took])
    return "\n".join([aligned(lines), *_selected_lines(cells)])


def _selected_lines(cells: Sequence[Cell]) -> list[str]:
    return [
        f"{cell.task} {cell.name} seed {cell.seed}: "
        + ", ".join(f"{kind} {weight:.2f}" for kind, weight in cell.selected.items())
        for cell in cells
        if cell.selected
    ]


def rows(cells: Sequence[Cell], command: str, what: str) -> list[str]:
    """A row for docs/measurements.md per task."""
    made = []
    for task in dict.fromkeys(cell.task for cell in cells):
        groups = {name: g for (of, name), g in _groups(cells).items() if of == task}
        spreads = {n: mean_and_deviation([cell.score for cell in g]) for n, g in groups.items()}
        means = ", ".join(f"{name} {mean:.2f}" for name, (mean, _) in spreads.items())
        deviations = ", ".join(f"{name} {sd:.2f}" for name, (_, sd) in spreads.items())
        seeds = len({cell.seed for cell in cells if cell.task == task})
        made.append(
            markdown_row(
                f"{task}, {what}", command, means, f"sd over {seeds} seed(s): {deviations}"
            )
        )
    return made
