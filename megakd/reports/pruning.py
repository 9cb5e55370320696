"""The pruning section of a report: a student that is pruned while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from megakd.reports.charts import Chart, Line, line_chart
from megakd.reports.history import Points, thinned
from megakd.reports.quantities import is_number, short_count, step_time
from megakd.reports.table import Rows, pruning_course, pruning_rows

if TYPE_CHECKING:
    from megakd.contract.results import PruningReport, Report

Key = Literal["teacher_kl", "parameters", "step_seconds"]

ROWS_SHOWN, POINTS_SHOWN, POINTS_MARKED = 15, 300, 15
LARGEST = 1e300
"""The scales of a chart overflow beyond this value."""
CHARTS: Sequence[tuple[Key, str, str]] = (
    ("teacher_kl", "KL divergence from the teacher", "nats per target"),
    ("parameters", "parameters of the student", ""),
    ("step_seconds", "step time", "seconds, median"),
)
"""Key, title and unit of each chart."""


class Pruning(NamedTuple):
    """The content of the section.

    sentences: sizes, divergence and step time in words.
    charts: one chart for each value that at least two evaluations have.
    numbers: titles, then one row per evaluation, for at most `ROWS_SHOWN` of all `evaluations`.
    """

    sentences: Sequence[str]
    charts: Sequence[Chart]
    caption: str
    numbers: Rows
    evaluations: int


def pruning_section(report: Report) -> Pruning | None:
    """Return the section, or None for a method that does not prune during training."""
    rows = pruning_course(report)
    if not rows:
        return None
    curves = {key: _points(rows, key) for key, *_ in CHARTS}
    sentences = (
        _size_sentence(rows, report),
        _divergence_sentence(curves["teacher_kl"]),
        _time_sentence(curves["step_seconds"]),
    )
    return Pruning(
        [sentence for sentence in sentences if sentence],
        [_chart(title, unit, curves[key]) for key, title, unit in CHARTS if len(curves[key]) > 1],
        _caption(rows, list(curves.values())),
        pruning_rows(report, most=ROWS_SHOWN),
        len(rows),
    )


def _points(rows: Sequence[PruningReport], key: Key) -> Points:
    values = [(row["step"], row[key]) for row in rows]
    return [(s, float(v)) for s, v in values if is_number(v) and abs(v) <= LARGEST]


def _chart(title: str, unit: str, points: Points) -> Chart:
    ends = [short_count(value, ".4g") for _, value in (points[0], points[-1])]
    shown = thinned(points, POINTS_SHOWN)
    return line_chart(
        [Line(shown, "student", marked=len(points) <= POINTS_MARKED)],
        title=title,
        unit=unit,
        label=f"Pruning over the steps: {title}. From {ends[0]} to {ends[1]}.",
        bounds=(0.0,),
    )


def _caption(rows: Sequence[PruningReport], curves: Sequence[Points]) -> str:
    drawn = [len(points) for points in curves if len(points) > 1]
    is_thinned, has_gaps = max(drawn, default=0) > POINTS_SHOWN, min(drawn, default=0) < len(rows)
    notes = (
        "The divergence is soft_target_kl on held-out rows; 0: the predictions of the teacher.",
        "The parameters are those of the student as it would be exported.",
        "The step time is the median since the previous evaluation.",
        "Evaluations without a value are left out." if has_gaps else "",
        "Of long curves the lowest and highest value of each stretch are drawn."
        if is_thinned
        else "",
    )
    return " ".join(filter(None, notes))


def _size_sentence(rows: Sequence[PruningReport], report: Report) -> str:
    first, last = rows[0], rows[-1]
    teacher = report["teacher"]
    whole = f" of {short_count(teacher['parameters'])} parameters" if teacher else ""
    start = f"The student starts as its teacher{whole} and loses units during training."
    if len(rows) == 1:
        return f"{start} At step {first['step']:,}, it has {_size(first)}."
    return (
        f"{start} Between step {first['step']:,} and step {last['step']:,}, it goes from "
        f"{_size(first)} to {_size(last)}."
    )


def _size(row: PruningReport) -> str:
    return f"{short_count(row['parameters'])} parameters (width {row['width']:,})"


def _divergence_sentence(points: Points) -> str:
    if not points:
        return "Its KL divergence from the teacher was not measured."
    (first, start), (last, end) = points[0], points[-1]
    known = f"Its KL divergence from the teacher is {start:.4g} nats at step {first:,}"
    if len(points) == 1:
        return f"{known}."
    before, after = max(pairwise(points), key=lambda pair: pair[1][1] - pair[0][1])
    rise = after[1] - before[1]
    jump = (
        f"the largest rise between two evaluations is {rise:.4g} nats, from step {before[0]:,} to "
        f"step {after[0]:,}"
        if rise > 0
        else "it rises between no two evaluations"
    )
    return f"{known} and {end:.4g} nats at step {last:,}; {jump}."


def _time_sentence(points: Points) -> str:
    if not points:
        return ""
    (first, start), (last, end) = points[0], points[-1]
    known = f"The median step time is {step_time(start)} before step {first:,}"
    if len(points) == 1:
        return f"{known}."
    return f"{known} and {step_time(end)} before step {last:,}."
