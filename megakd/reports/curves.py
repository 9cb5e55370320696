"""The charts of a stage, from its curves: losses, evaluations, speed, generated texts, pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from megakd.contract.metric import lower_is_better
from megakd.contract.results import Report
from megakd.contract.tasks import TEXT_METRIC, is_text_metric
from megakd.contract.unit_counts import without_source
from megakd.reports.charts import Chart, Line, line_chart
from megakd.reports.history import LARGEST, Curve, Panels, evenly, thinned
from megakd.reports.quantities import is_number, short_count
from megakd.reports.table import SHARES, Rows, pruning_course, pruning_rows

STAGES_SHOWN, PANELS_SHOWN, LINES_PER_PANEL = 20, 6, 12
ROWS_SHOWN, COLUMNS_SHOWN, POINTS_MARKED = 15, 24, 15
CHOICES, OUTCOME = "Choices", "Outcome of the choices"
OPERATIONS = "Operations of models"
EVALUATION, SPEED = "Evaluation", "Speed and step size"
THINNED = "Of long curves the lowest and highest value of each stretch are drawn."
SPEED_UNITS = {
    "learning_rate": "step size",
    "gradient_norm": "L2 norm",
    "loss_scale": "factor of the loss",
    "skipped_steps": "steps",
    "tokens_per_s": "tokens/s",
    "teacher_share": "% of the time",
    "data_share": "% of the time",
}
OPERATION_UNITS = {
    "student_tflops": "1e12 operations per second and rank",
    "teacher_tflops": "1e12 operations per second and rank",
    "peak_share": "% of the device's peak",
}
UNITS = {
    "loss": "weighted sum",
    "top1_agreement": "%",
    **SPEED_UNITS,
    **OPERATION_UNITS,
    **dict.fromkeys((*SHARES, "truncated", "distinct_2"), "%"),
    **dict.fromkeys((f"{TEXT_METRIC}tokens", "tokens_per_text"), "tokens"),
    "staleness": "updates of the student",
    "seconds": "s for generation",
}
OTHERS = (*SPEED_UNITS, *OPERATION_UNITS, "step_seconds", "memory_bytes")
"""Values of training that are no losses; of the last two, tokens_per_s and a stage's peak tell."""
OUTCOMES = ("reward", "held_out_loss")
"""Values that a selector logs in addition to its weights."""
Key = Literal["teacher_kl", "parameters", "step_seconds"]

PRUNING_POINTS = 300
PRUNING_CHARTS: Sequence[tuple[Key, str, str]] = (
    ("teacher_kl", "KL divergence from the teacher", "nats per target"),
    ("parameters", "parameters of the student", ""),
    ("step_seconds", "step time", "seconds, median"),
)
"""Key, title and unit of each chart."""


class Figure(NamedTuple):
    """The charts of one kind, such as losses, and their numbers.

    legend: name, colour and look of each line.
    numbers: titles, then one row per step.
    extent: how many of the rows are shown, such as "15 of 400 steps"; empty if all are.
    """

    kind: str
    charts: Sequence[Chart]
    caption: str
    numbers: Rows
    extent: str = ""
    legend: Sequence[tuple[str, str, str]] = ()
    is_folded: bool = False


def training(
    stages: Mapping[str, Mapping[str, Panels]], names: Sequence[str]
) -> tuple[dict[str, list[Figure]], int]:
    """Return the figures of each stage, and the number of stages that are left out."""
    order = [*(name for name in names if name in stages), *(n for n in stages if n not in names)]
    drawable = {name: kinds for name in order if (kinds := _kinds(stages[name]))}
    shown = dict(list(drawable.items())[:STAGES_SHOWN])
    lines = sum(len(by_view) for k in shown.values() for p in k.values() for by_view in p.values())
    limit = max(24, min(300, 24_000 // max(1, lines)))
    figures = {
        stage: [_figure(kind, panels, stage=stage, limit=limit) for kind, panels in kinds.items()]
        for stage, kinds in shown.items()
    }
    return figures, len(drawable) - len(shown)


def _kinds(groups: Mapping[str, Panels]) -> dict[str, Panels]:
    train, choices, scores = (groups.get(name, {}) for name in ("train", "select", "eval"))
    weights = {n: c[""] for n, c in choices.items() if "" in c and n not in OUTCOMES}
    kinds = {
        "Losses": {n: c for n, c in train.items() if n not in OTHERS},
        CHOICES: {"weight of each kind of knowledge": weights},
        OUTCOME: {n: c for n, c in choices.items() if n in OUTCOMES},
        EVALUATION: {n: c for n, c in scores.items() if not is_text_metric(n)},
        "Generated texts of the evaluations": {
            n: c for n, c in scores.items() if is_text_metric(n)
        },
        "Texts that the student learns from": groups.get("rollout", {}),
        SPEED: {n: train[n] for n in SPEED_UNITS if n in train},
        OPERATIONS: {n: train[n] for n in OPERATION_UNITS if n in train},
    }
    drawable = {kind: _drawable(panels) for kind, panels in kinds.items()}
    drawable["Losses"] = _merged(drawable["Losses"])
    return {kind: dict(list(p.items())[:PANELS_SHOWN]) for kind, p in drawable.items() if p}


def _drawable(panels: Panels) -> Panels:
    long = {n: [(v, c) for v, c in p.items() if len(c.points) > 1] for n, p in panels.items()}
    return {name: dict(curves[:LINES_PER_PANEL]) for name, curves in long.items() if curves}


def _merged(panels: Panels) -> Panels:
    merged: Panels = {}
    for name, curves in panels.items():
        same = next((other for other in merged if _are_alike(merged[other], curves)), name)
        merged.setdefault(same, curves)
        if same != name:
            merged = {f"{n} = {name}" if n == same else n: shown for n, shown in merged.items()}
    return merged


def _are_alike(one: Mapping[str, Curve], other: Mapping[str, Curve]) -> bool:
    return one.keys() == other.keys() and all(
        len(curve.points) == len(other[view].points)
        and np.allclose(curve.points, other[view].points, rtol=1e-5, atol=0)
        for view, curve in one.items()
    )


def _figure(kind: str, panels: Panels, *, stage: str, limit: int) -> Figure:
    curves = [curve for by_view in panels.values() for curve in by_view.values()]
    looks = _looks(list(dict.fromkeys(view for by_view in panels.values() for view in by_view)))
    whole = "kept" if kind == EVALUATION else "all"
    names = {view: view or whole for view in looks}
    legend = [(names[v], colour, "dashed" if d else "") for v, (colour, d) in looks.items()]
    not_finite = sum(curve.not_finite for curve in curves)
    notes = (
        f"{kind}. As logged, not smoothed.",
        THINNED if any(len(curve.points) > limit for curve in curves) else "",
        f"Values left out because they were not finite: {not_finite}." if not_finite else "",
        "A weight is between 0 (the kind of knowledge is not used) and 1."
        if kind == CHOICES
        else "Each line is a candidate."
        if any(looks)
        else "",
    )
    return Figure(
        kind,
        [_chart(n, c, looks, kind=kind, stage=stage, limit=limit) for n, c in panels.items()],
        " ".join(filter(None, notes)),
        *_numbers(panels),
        legend=legend if len(legend) > 1 else (),
        is_folded=kind in (SPEED, OPERATIONS),
    )


def _looks(views: Sequence[str]) -> dict[str, tuple[str, bool]]:
    named = [view for view in views if view]
    # The page has the colours ramp-0 to ramp-11.
    ramp = {view: f"ramp-{i * 11 // max(1, len(named) - 1)}" for i, view in enumerate(named)}
    whole = ("ink", True) if named else ("student", False)
    return {view: (ramp[view], False) if view else whole for view in views}


def _chart(
    name: str,
    curves: Mapping[str, Curve],
    looks: Mapping[str, tuple[str, bool]],
    *,
    kind: str,
    stage: str,
    limit: int,
) -> Chart:
    unit, points = _unit(name, kind), curves[""].points if "" in curves else ()
    ends = f" From {points[0][1]:.4g} to {points[-1][1]:.4g}." if points else ""
    return line_chart(
        [
            Line(thinned(c.points, limit), *looks[view], marked=len(c.points) <= POINTS_MARKED)
            for view, c in curves.items()
        ],
        title=name.replace("_", " "),
        unit=unit,
        label=f"{kind} of stage {stage} over its steps: {name}.{ends}",
        may_be_log=not unit.startswith("%") and name != "learning_rate",
        bounds=(0.0, 1.0) if kind == CHOICES else (),
    )


def _unit(name: str, kind: str) -> str:
    # Weights of choices have no unit.
    last = without_source(name.rpartition(" = ")[2])
    if kind == EVALUATION:
        return "lower is better" if lower_is_better(last) else "%"
    if kind in (CHOICES, OUTCOME):
        return "lower is better" if last == "held_out_loss" else ""
    return "nats" if last.endswith(("_kl", "_jsd", "_entropy")) else UNITS.get(last, "")


def _numbers(panels: Panels) -> tuple[Rows, str]:
    titles = [f"{name} {view}".strip() for name, curves in panels.items() for view in curves]
    values = [dict(curve.points) for curves in panels.values() for curve in curves.values()]
    values = values[:COLUMNS_SHOWN]
    steps = sorted({step for column in values for step in column})
    shown = evenly(steps, ROWS_SHOWN)
    rows = [[f"{step:,}", *(_value(column.get(step)) for column in values)] for step in shown]
    extent = f"{len(shown):,} of {len(steps):,} steps" if len(shown) < len(steps) else ""
    return [["step", *titles[:COLUMNS_SHOWN]], *rows], extent


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def pruning_section(report: Report) -> Figure | None:
    """Return sizes, divergence and step times, or None if nothing was pruned during training."""
    rows = pruning_course(report)
    if not rows:
        return None
    charts: list[Chart] = []
    drawn: list[int] = []
    for key, title, unit in PRUNING_CHARTS:
        values = [(row["step"], row[key]) for row in rows]
        points = [(s, float(v)) for s, v in values if is_number(v) and abs(v) <= LARGEST]
        if len(points) > 1:
            drawn.append(len(points))
            start, end = (short_count(value, ".4g") for _, value in (points[0], points[-1]))
            shown, is_marked = thinned(points, PRUNING_POINTS), len(points) <= POINTS_MARKED
            charts.append(
                line_chart(
                    [Line(shown, "student", marked=is_marked)],
                    title=title,
                    unit=unit,
                    label=f"Pruning over the steps: {title}. From {start} to {end}.",
                    bounds=(0.0,),
                )
            )
    notes = (
        "The divergence is soft_target_kl on held-out rows; 0: the predictions of the teacher.",
        "The parameters are those of the student as it would be exported.",
        "The step time is the median since the previous evaluation.",
        "Evaluations without a value are left out." if min(drawn, default=0) < len(rows) else "",
        THINNED if max(drawn, default=0) > PRUNING_POINTS else "",
    )
    extent = f"{ROWS_SHOWN} of {len(rows):,} evaluations" if len(rows) > ROWS_SHOWN else ""
    numbers = pruning_rows(report, most=ROWS_SHOWN)
    return Figure("Pruning", charts, " ".join(filter(None, notes)), numbers, extent)
