"""The pruning section of a report: a student that is pruned while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from megakd.contract.results import PruningReport, Report
from megakd.reports.charts import Chart, Line, line_chart
from megakd.reports.curves import POINTS_MARKED, ROWS_SHOWN, THINNED, Figure
from megakd.reports.history import LARGEST, Points, thinned
from megakd.reports.quantities import is_number, short_count, step_time
from megakd.reports.table import pruning_course, pruning_rows

Key = Literal["teacher_kl", "parameters", "step_seconds"]

POINTS_SHOWN = 300
CHARTS: Sequence[tuple[Key, str, str]] = (
    ("teacher_kl", "KL divergence from the teacher", "nats per target"),
    ("parameters", "parameters of the student", ""),
    ("step_seconds", "step time", "seconds, median"),
)
"""Key, title and unit of each chart."""


class Pruning(NamedTuple):
    """The content of the section: sizes, divergence and step time in words and as charts."""

    sentences: Sequence[str]
    figure: Figure


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
    numbers, total = pruning_rows(report, most=ROWS_SHOWN), len(rows)
    extent = f"{ROWS_SHOWN} of {total:,} evaluations" if total > ROWS_SHOWN else ""
    charts = [_chart(title, unit, curves[k]) for k, title, unit in CHARTS if len(curves[k]) > 1]
    caption = _caption(total, [len(points) for points in curves.values() if len(points) > 1])
    figure = Figure("Pruning", charts, caption, numbers, extent)
    return Pruning([sentence for sentence in sentences if sentence], figure)


def _points(rows: Sequence[PruningReport], key: Key) -> Points:
    values = [(row["step"], row[key]) for row in rows]
    return [(s, float(v)) for s, v in values if is_number(v) and abs(v) <= LARGEST]


def _chart(title: str, unit: str, points: Points) -> Chart:
    start, end = (short_count(value, ".4g") for _, value in (points[0], points[-1]))
    shown = thinned(points, POINTS_SHOWN)
    return line_chart(
        [Line(shown, "student", marked=len(points) <= POINTS_MARKED)],
        title=title,
        unit=unit,
        label=f"Pruning over the steps: {title}. From {start} to {end}.",
        bounds=(0.0,),
    )


def _caption(evaluations: int, drawn: Sequence[int]) -> str:
    notes = (
        "The divergence is soft_target_kl on held-out rows; 0: the predictions of the teacher.",
        "The parameters are those of the student as it would be exported.",
        "The step time is the median since the previous evaluation.",
        "Evaluations without a value are left out." if min(drawn, default=0) < evaluations else "",
        THINNED if max(drawn, default=0) > POINTS_SHOWN else "",
    )
    return " ".join(filter(None, notes))


def _size_sentence(rows: Sequence[PruningReport], report: Report) -> str:
    teacher = report["teacher"]
    whole = f" of {short_count(teacher['parameters'])} parameters" if teacher else ""
    start = f"The student starts as its teacher{whole} and loses units during training."
    (first, small), (last, smaller) = (
        (f"step {row['step']:,}", f"{short_count(row['parameters'])} parameters (width "
        f"{row['width']:,})") for row in (rows[0], rows[-1])
    )  # fmt: skip
    if len(rows) == 1:
        return f"{start} At {first}, it has {small}."
    return f"{start} Between {first} and {last}, it goes from {small} to {smaller}."


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
    ends = [f"{step_time(seconds)} before step {step:,}" for step, seconds in points]
    if not ends:
        return ""
    return f"The median step time is {' and '.join(ends[:1] + ends[1:][-1:])}."
