"""The training section of a report: losses, evaluations and speed of every stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from megakd.contract.metrics import lower_is_better
from megakd.contract.sources import without_source
from megakd.contract.tasks import MATCH, TEXT_METRIC, is_text_metric
from megakd.reports.charts import Chart, Line, line_chart
from megakd.reports.generated import SHARES
from megakd.reports.history import Curve, Panels, evenly, thinned
from megakd.reports.table import Rows

STAGES_SHOWN, PANELS_SHOWN, LINES_PER_PANEL = 20, 6, 12
ROWS_SHOWN, COLUMNS_SHOWN = 15, 24
CHOICES, OUTCOME = "Choices", "Outcome of the choices"
EVALUATION, SPEED = "Evaluation", "Speed and step size"
GENERATED, ROLLOUTS = "Generated texts of the evaluations", "Texts that the student learns from"
CHOICE_NOTE = "A weight is between 0 (the kind of knowledge is not used) and 1."
SPEED_UNITS = {
    "learning_rate": "step size",
    "gradient_norm": "L2 norm",
    "loss_scale": "factor of the loss",
    "skipped_steps": "steps",
    "tokens_per_s": "tokens/s",
    "teacher_share": "% of the time",
    "data_share": "% of the time",
}
TEXT_UNITS = {
    **dict.fromkeys((*SHARES, "truncated", "distinct_2"), "%"),
    **dict.fromkeys((f"{TEXT_METRIC}tokens", "tokens_per_text"), "tokens"),
    "staleness": "updates of the student",
    "seconds": "s for generation",
}
UNITS = {"loss": "weighted sum", "top1_agreement": "%", **SPEED_UNITS, **TEXT_UNITS}
TEXT_ORDER = (MATCH, *(f"{TEXT_METRIC}{n}" for n in ("kl", "tokens", "truncated", "entropy")))
"""Metrics of generated texts that are drawn first."""
NOT_DRAWN = ("step_seconds", "memory_bytes")  # tokens_per_s and a stage's peak show the same
OUTCOMES = ("reward", "held_out_loss")
"""Values that a selector logs in addition to its weights."""


class Figure(NamedTuple):
    """The charts of one kind, such as losses, and their numbers.

    legend: name, colour and look of each line.
    note: meaning of the lines.
    is_folded: whether the charts are shown on demand.
    is_thinned: whether some lines do not show all points.
    not_finite: number of values that are left out.
    numbers: titles, then one row per step, for at most `ROWS_SHOWN` of `steps` steps.
    """

    kind: str
    charts: Sequence[Chart]
    legend: Sequence[tuple[str, str, str]]
    note: str
    is_folded: bool
    is_thinned: bool
    not_finite: int
    numbers: Rows
    steps: int


def training(
    stages: Mapping[str, Mapping[str, Panels]], names: Sequence[str]
) -> tuple[dict[str, list[Figure]], int]:
    """Return the curves of each stage, and the number of stages that are left out.

    Args:
        stages: the logged values by stage, see `history.panels`.
        names: names of the report's stages, which come first and in this order.
    """
    order = [*(name for name in names if name in stages), *(n for n in stages if n not in names)]
    drawable = {name: kinds for name in order if (kinds := _kinds(stages[name]))}
    shown = dict(list(drawable.items())[:STAGES_SHOWN])
    lines = sum(
        len(c) for kinds in shown.values() for kind in kinds.values() for c in kind.values()
    )
    limit = max(24, min(300, 24_000 // max(1, lines)))
    found = {
        stage: [_figure(title, kind, stage=stage, limit=limit) for title, kind in kinds.items()]
        for stage, kinds in shown.items()
    }
    return found, len(drawable) - len(shown)


def _kinds(groups: Mapping[str, Panels]) -> dict[str, Panels]:
    train, choices = groups.get("train", {}), groups.get("select", {})
    losses = {n: c for n, c in train.items() if n not in SPEED_UNITS and n not in NOT_DRAWN}
    weights = {n: c[""] for n, c in choices.items() if "" in c and n not in OUTCOMES}
    scores = groups.get("eval", {})
    ordered = [*(n for n in TEXT_ORDER if n in scores), *(n for n in scores if n not in TEXT_ORDER)]
    texts = {name: scores[name] for name in ordered if is_text_metric(name)}
    found = {
        "Losses": _merged(_drawable(losses)),
        CHOICES: _drawable({"weight of each kind of knowledge": weights}),
        OUTCOME: _drawable({n: c for n, c in choices.items() if n in OUTCOMES}),
        EVALUATION: _drawable({n: c for n, c in scores.items() if not is_text_metric(n)}),
        GENERATED: _drawable(texts),
        ROLLOUTS: _drawable(groups.get("rollout", {})),
        SPEED: _drawable({n: train[n] for n in SPEED_UNITS if n in train}),
    }
    return {kind: dict(list(p.items())[:PANELS_SHOWN]) for kind, p in found.items() if p}


def _drawable(panels: Panels) -> Panels:
    long = {n: [(v, c) for v, c in p.items() if len(c.points) > 1] for n, p in panels.items()}
    return {name: dict(curves[:LINES_PER_PANEL]) for name, curves in long.items() if curves}


def _merged(panels: Panels) -> Panels:
    found: Panels = {}
    for name, curves in panels.items():
        same = next((other for other in found if _are_alike(found[other], curves)), None)
        if same is None:
            found[name] = curves
        else:
            found = {f"{n} = {name}" if n == same else n: shown for n, shown in found.items()}
    return found


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
    note = "Each line is a candidate." if any(looks) else ""
    return Figure(
        kind,
        [_chart(n, c, looks, kind=kind, stage=stage, limit=limit) for n, c in panels.items()],
        [(v or whole, c, "dashed" if dashed else "") for v, (c, dashed) in looks.items()],
        CHOICE_NOTE if kind == CHOICES else note,
        kind == SPEED,
        any(len(curve.points) > limit for curve in curves),
        sum(curve.not_finite for curve in curves),
        *_numbers(panels),
    )


def _looks(views: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Return colour and dashing of each view's line; the model itself has the view ""."""
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
            Line(thinned(curve.points, limit), *looks[view], marked=len(curve.points) <= 15)
            for view, curve in curves.items()
        ],
        title=name.replace("_", " "),
        unit=unit,
        label=f"{kind} of stage {stage} over its steps: {name}.{ends}",
        may_be_log=not unit.startswith("%") and name != "learning_rate",
        bounds=(0.0, 1.0) if kind == CHOICES else (),
    )


def _unit(name: str, kind: str) -> str:
    """Return the unit of a value; weights of choices have no unit."""
    last = without_source(name.rpartition(" = ")[2])
    if kind == EVALUATION:
        return "lower is better" if lower_is_better(last) else "%"
    if kind in (CHOICES, OUTCOME):
        return "lower is better" if last == "held_out_loss" else ""
    return "nats" if last.endswith(("_kl", "_jsd", "_entropy")) else UNITS.get(last, "")


def _numbers(panels: Panels) -> tuple[Rows, int]:
    titles = [f"{name} {view}".strip() for name, curves in panels.items() for view in curves]
    values = [dict(curve.points) for curves in panels.values() for curve in curves.values()]
    values = values[:COLUMNS_SHOWN]
    steps = sorted({step for column in values for step in column})
    rows = [
        [f"{step:,}", *(f"{column[step]:.4g}" if step in column else "-" for column in values)]
        for step in evenly(steps, ROWS_SHOWN)
    ]
    return [["step", *titles[:COLUMNS_SHOWN]], *rows], len(steps)
