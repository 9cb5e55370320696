"""Summary of the runs of `homodistil.py`: losses, scores of tasks, and jumps of the divergence."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from homodistil_cases import HELD_OUT
from machine import markdown_row, mean_and_deviation, print_row
from summary import aligned

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

TEACHER = "teacher"
CUBIC, ONE_SHOT, ONE_SHOT_ALONE, EARLY = "homodistil", "one_shot", "one_shot_alone", "early"
PRUNED = {CUBIC: "cubic", ONE_SHOT: "one_shot", ONE_SHOT_ALONE: "one_shot", EARLY: "cubic"}
"""The students that are pruned, by schedule; the last has its final size sooner."""
NO_TEACHER = "objective=[{loss: hard_cross_entropy}]"
"""Override of `one_shot_alone`: the student starts as the teacher, and learns from text alone."""
RANDOM, ALONE = BASELINES = ("random", "alone")
VARIANTS = (*PRUNED, *BASELINES)
MEAN = "tasks"


class Found(NamedTuple):
    """The reports of the runs by name, None of a run that has not finished."""

    reports: Mapping[str, Mapping[str, Any] | None]
    seeds: Sequence[int]
    tasks: Sequence[str]

    def pruning(self, variant: str, seed: int) -> Mapping[str, Any] | None:
        """The report of the run that made a student."""
        return self.reports.get(f"{run_of(variant)}-{seed}")

    def score(self, task: str, variant: str, seed: int) -> float | None:
        """The main metric of a task, in points."""
        report = self.reports.get(f"{task}-{variant}-{seed}")
        return None if report is None else 100 * report["student"]["metrics"][report["metric_name"]]


def run_of(variant: str) -> str:
    """The run that trains a student; a baseline belongs to the run of the method."""
    return CUBIC if variant in BASELINES else variant


def show(found: Found, command: str) -> None:
    """The table, the jumps, and the row for docs/measurements.md."""
    lines = {name: numbers(found, name) for name in (TEACHER, *VARIANTS)}
    titles = list(dict.fromkeys(title for line in lines.values() for title in line))
    cells = [[name, *(_cell(line.get(t, ())) for t in titles)] for name, line in lines.items()]
    print(aligned([["model", *titles], *cells]))
    jumps = homotopy(found)
    for seed, (cubic, one_shot) in jumps.items():
        print(f"seed {seed}: largest jump of the divergence: cubic {cubic:.4f}, one_shot", end=" ")
        print(f"{one_shot:.4f}, ratio {one_shot / cubic:.1f}")
    print_row(row(lines, jumps, command))


def numbers(found: Found, variant: str) -> dict[str, list[float]]:
    """Every column's values over the seeds, without those of runs that have not finished."""
    columns = {"loss": [held_out(found, variant, seed) for seed in found.seeds]}
    by_task = {t: [found.score(t, variant, seed) for seed in found.seeds] for t in found.tasks}
    complete = [scores for scores in zip(*by_task.values(), strict=True) if None not in scores]
    columns |= by_task | {MEAN: [mean_and_deviation(scores)[0] for scores in complete]}
    columns["parameters"] = [parameters(found, variant, seed) for seed in found.seeds]
    columns["seconds"] = [seconds(found, variant, seed) for seed in found.seeds]
    if variant == TEACHER:
        columns |= {title: columns[title][:1] for title in ("parameters", "seconds")}
    return {t: [v for v in values if v is not None] for t, values in columns.items()}


def held_out(found: Found, variant: str, seed: int) -> float | None:
    """The loss of masked tokens on all held-out text, in rows of the students' length."""
    report = found.pruning(CUBIC if variant == TEACHER else variant, seed)
    if report is None:
        return None
    model = "student" if variant in PRUNED else variant
    return report["evaluation_sets"][HELD_OUT]["metrics"][model]["loss"]


def parameters(found: Found, variant: str, seed: int) -> int | None:
    """The number of weights; all students have one shape."""
    report = found.reports.get(TEACHER) if variant == TEACHER else found.pruning(variant, seed)
    return None if report is None else report["student"]["parameters"]


def seconds(found: Found, variant: str, seed: int) -> float | None:
    """The seconds of training on text."""
    report = found.reports.get(TEACHER) if variant == TEACHER else found.pruning(variant, seed)
    return None if report is None else seconds_of(report, variant)


def seconds_of(report: Mapping[str, Any], variant: str) -> float:
    """The seconds of training of a variant, from the report of its run."""
    return sum(stage["seconds"] for stage in stages_of(report, variant))


def stages_of(report: Mapping[str, Any], variant: str) -> list[Mapping[str, Any]]:
    """The stages that trained a variant, from the report of its run."""
    stages = {stage["name"]: stage for stage in report["stages"]}
    if variant in BASELINES:
        return [stages[variant]]
    return [stage for name, stage in stages.items() if name not in BASELINES]


def homotopy(found: Found) -> dict[int, tuple[float, float]]:
    """By seed the largest jumps of the schedules, gradual and at once."""
    names = (CUBIC, ONE_SHOT)
    pairs = {seed: [found.pruning(name, seed) for name in names] for seed in found.seeds}
    return {
        seed: (largest_jump(cubic["pruning"]), largest_jump(one_shot["pruning"]))
        for seed, (cubic, one_shot) in pairs.items()
        if cubic is not None and one_shot is not None
    }


def largest_jump(rows: Iterable[Mapping[str, Any]]) -> float:
    """How far the divergence rises at most from one evaluation to the next; it starts at 0."""
    path = [0.0, *(row["teacher_kl"] for row in rows)]
    return max(after - before for before, after in pairwise(path))


def row(
    lines: Mapping[str, Mapping[str, Sequence[float]]],
    jumps: Mapping[int, tuple[float, float]],
    command: str,
) -> str:
    """The row for docs/measurements.md."""
    means, spreads = list[str](), list[str]()
    for name, line in lines.items():
        spans = {t: mean_and_deviation(line[t]) for t in ("loss", MEAN) if line.get(t)}
        means.append(f"{name} " + ", ".join(f"{t} {mean:.3f}" for t, (mean, _) in spans.items()))
        spreads.append(f"{name} " + ", ".join(f"{sd:.3f}" for _, sd in spans.values()))
    ratios = [one_shot / cubic for cubic, one_shot in jumps.values()]
    if ratios:
        means.append("jump of one_shot over cubic " + ", ".join(f"{r:.1f}" for r in ratios))
    what = "HomoDistil, held-out loss and mean score of the tasks"
    return markdown_row(what, command, "; ".join(means), "sd: " + "; ".join(spreads))


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    if mean >= 1000:
        return f"{mean:,.0f}"
    return f"{mean:.3f} ±{deviation:.3f}" if len(values) > 1 else f"{mean:.3f}"
