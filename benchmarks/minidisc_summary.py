"""Summary of the legs of `minidisc.py`: correlations, paired differences, times."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from machine import markdown_row, mean_and_deviation, mean_interval
from scipy.stats import spearmanr
from summary import aligned

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DIFFERENCE_TARGET = -0.5
TIME_TARGET = 0.6
POINTS = 100


class Outcome(NamedTuple):
    """One task and seed; scores in points, on the split that the reports are about.

    tried: Spearman's correlation, over the grid, of the trade-offs of assistants that were trained
        one by one with the scores of the students that they taught.
    in_trial: likewise, of the trade-offs that MiniDisc's first trial saw.
    regret: what the best student has over the one taught by the assistant that MiniDisc chose,
        both trained by MaxiDisc, in points of the validation split.
    chosen: the sparsity that MiniDisc chose; best: of the assistant with the best student.
    ratio: MiniDisc's seconds of training over MaxiDisc's.
    """

    task: str
    seed: int
    teacher: float
    minidisc: float
    maxidisc: float
    direct: float
    tried: float
    in_trial: float
    regret: float
    chosen: float
    best: float
    ratio: float
    seconds: float

    @property
    def to_best(self) -> float:
        """MiniDisc's student against MaxiDisc's best, in points."""
        return self.minidisc - self.maxidisc

    @property
    def to_direct(self) -> float:
        """MiniDisc's student against the one without an assistant, in points."""
        return self.minidisc - self.direct


def outcome(task: str, seed: int, reports: Mapping[str, Mapping[str, Any]]) -> Outcome:
    """Reads the reports of one task and seed, by method."""
    minidisc, maxidisc = reports["minidisc"], reports["maxidisc"]
    students = {row["sparsity"]: row["student_metric"] for row in maxidisc["candidates"]}
    tried = {row["sparsity"]: row["tradeoff"] for row in maxidisc["candidates"]}
    trial = [row for row in minidisc["candidates"] if row["iteration"] == 1]
    chosen = next(row["sparsity"] for row in trial if row["chosen"])
    scores = {name: score(report) for name, report in reports.items()}
    return Outcome(
        task=task,
        seed=seed,
        teacher=score(minidisc, "teacher"),
        **scores,
        tried=correlation(tried, students),
        in_trial=correlation({row["sparsity"]: row["tradeoff"] for row in trial}, students),
        regret=POINTS * (max(students.values()) - students[chosen]),
        chosen=chosen,
        best=max(students, key=lambda sparsity: students[sparsity]),
        ratio=seconds(minidisc) / seconds(maxidisc),
        seconds=seconds(minidisc),
    )


def score(report: Mapping[str, Any], model: str = "student") -> float:
    """The headline metric of a model, in points."""
    return POINTS * report[model]["metrics"][report["metric_name"]]


def seconds(report: Mapping[str, Any]) -> float:
    """Seconds of all stages, evaluations and saves included."""
    return sum(stage["seconds"] for stage in report["stages"])


def correlation(tradeoffs: Mapping[float, float], students: Mapping[float, float]) -> float:
    """Spearman's, over the sparsities that both have; NaN where it is not defined."""
    shared = [sparsity for sparsity in tradeoffs if sparsity in students]
    pairs = [(tradeoffs[sparsity], students[sparsity]) for sparsity in shared]
    if len(pairs) < 2 or any(len(set(column)) < 2 for column in zip(*pairs, strict=True)):
        return math.nan
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


COLUMNS = (
    *("teacher", "minidisc", "maxidisc", "direct", "to_best", "to_direct", "tried", "in_trial"),
    *("regret", "chosen", "best", "ratio", "seconds"),
)


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per task and seed, and the means."""
    lines = [["task", "seed", *COLUMNS]]
    lines += ([o.task, str(o.seed), *(_cell(getattr(o, c)) for c in COLUMNS)] for o in outcomes)
    lines.append(["mean", "", *(_cell(_mean(getattr(o, c) for o in outcomes)) for c in COLUMNS)])
    return aligned(lines)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """The claims, each with what was measured over all tasks and seeds."""
    mean, low, _ = mean_interval([found.to_best for found in outcomes])
    ratio = _mean(found.ratio for found in outcomes)
    correlations = {name: _with_interval(outcomes, name) for name in ("tried", "in_trial")}
    lines = [
        f"minidisc - maxidisc's best, points: {_with_interval(outcomes, 'to_best')}",
        f"  at least {DIFFERENCE_TARGET}: the mean {_answer(mean >= DIFFERENCE_TARGET)}, "
        f"its whole interval {_answer(low >= DIFFERENCE_TARGET)}",
        f"minidisc - direct, points: {_with_interval(outcomes, 'to_direct')}",
        f"correlation of trade-off and student, assistants tried: {correlations['tried']}",
        f"correlation of trade-off and student, seen in the trial: {correlations['in_trial']}",
        f"regret of the choice, points: {_with_interval(outcomes, 'regret')}",
        f"training time of minidisc / maxidisc: {ratio:.2f}",
        f"  at most {TIME_TARGET}: {_answer(ratio <= TIME_TARGET)}",
    ]
    return "\n".join(lines)


def rows(outcomes: Sequence[Outcome], command: str, what: str) -> list[str]:
    """For docs/measurements.md: one row per task."""
    made = []
    for task in dict.fromkeys(found.task for found in outcomes):
        mine = [found for found in outcomes if found.task == task]
        names = ("teacher", "minidisc", "maxidisc", "direct")
        means = {name: mean_and_deviation([getattr(o, name) for o in mine]) for name in names}
        numbers = ", ".join(f"{name} {mean:.2f}" for name, (mean, _) in means.items())
        numbers += f"; correlation {_mean(o.tried for o in mine):.2f}"
        numbers += f", in the trial {_mean(o.in_trial for o in mine):.2f}"
        numbers += f"; time {_mean(o.ratio for o in mine):.2f} of maxidisc's"
        spread = f"sd over {len(mine)} seed(s): "
        spread += ", ".join(f"{name} {deviation:.2f}" for name, (_, deviation) in means.items())
        spread += f"; to maxidisc's best {_with_interval(mine, 'to_best')}"
        made.append(markdown_row(f"{task}, {what}", command, numbers, spread))
    return made


def _with_interval(outcomes: Sequence[Outcome], name: str) -> str:
    values = [getattr(found, name) for found in outcomes]
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return "not defined"
    mean, low, high = mean_interval(defined)
    return f"{mean:.2f}" if math.isnan(low) else f"{mean:.2f} (95 %: {low:.2f} to {high:.2f})"


def _answer(is_met: bool) -> str:  # noqa: FBT001
    return "yes" if is_met else "no"


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return float(np.mean(finite)) if finite else math.nan


def _cell(value: float) -> str:
    return f"{value:.2f}"
