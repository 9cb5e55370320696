"""The training section of a report: losses, evaluations and speed of every stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megakd.contract.metrics import lower_is_better
from megakd.reports.charts import Curve as Line
from megakd.reports.charts import line_chart
from megakd.reports.history import Curve, Panel, evenly, thinned
from megakd.reports.page import RAMP_LENGTH, Figure, Folded, Paragraph, Section, Table

if TYPE_CHECKING:
    from megakd.reports.charts import Chart
    from megakd.reports.page import Block

STAGES_SHOWN = 20
LINES_PER_PANEL = 12
PANELS_SHOWN = 6
ROWS_SHOWN = 15
COLUMNS_SHOWN = 24
POINTS_ON_THE_PAGE = 24_000
POINTS_PER_LINE = (24, 300)
SELECTION = "select"
"""The group of values that a strategy logs about its choices."""
SPEED = ("learning_rate", "gradient_norm", "tokens_per_s", "teacher_share", "data_share")
NOT_DRAWN = ("step_seconds", "memory_bytes")  # tokens_per_s and a stage's peak show the same
UNITS = {
    "loss": "weighted sum",
    "top1_agreement": "%",
    "learning_rate": "step size",
    "gradient_norm": "L2 norm",
    "tokens_per_s": "tokens/s",
    "teacher_share": "% of the time",
    "data_share": "% of the time",
}
OUTCOMES = ("reward", "held_out_loss")
"""Values that a selector logs in addition to its weights."""
WEIGHTS = "weight of each kind of knowledge"
CHOICES_TITLE, OUTCOME_TITLE = "Choices", "Outcome of the choices"
EVALUATION_TITLE, SPEED_TITLE = "Evaluation", "Speed and step size"
NATS = ("_kl", "_jsd", "_cross_entropy")

Groups = Mapping[str, Sequence[Panel]]


class _Kind(NamedTuple):
    """The charts of one kind, such as losses or evaluations."""

    title: str
    panels: list[Panel]


def training_sections(stages: Mapping[str, Groups], names: Sequence[str]) -> Iterator[Block]:
    """Yield the curves of each stage; the stages of the report come first.

    Args:
        stages: the logged values by stage, see `history.panels`.
        names: names of the report's stages, in order.
    """
    order = [*(name for name in names if name in stages), *(n for n in stages if n not in names)]
    kinds = {name: [kind for kind in _kinds(stages[name]) if kind.panels] for name in order}
    shown = [name for name in order if kinds[name]][:STAGES_SHOWN]
    lines = sum(len(panel.curves) for n in shown for kind in kinds[n] for panel in kind.panels)
    low, high = POINTS_PER_LINE
    points = max(low, min(high, POINTS_ON_THE_PAGE // max(1, lines)))
    for name in shown:
        blocks = [block for kind in kinds[name] for block in _group(kind, name, points)]
        yield Section(name, blocks, level=3)
    left_out = sum(bool(kinds[name]) for name in order) - len(shown)
    if left_out:
        yield Paragraph(f"{left_out} more stages are in metrics.jsonl.", muted=True)


def _kinds(groups: Groups) -> list[_Kind]:
    train = groups.get("train", ())
    losses = [panel for panel in train if panel.name not in (*SPEED, *NOT_DRAWN)]
    choices = groups.get(SELECTION, ())
    speed = [panel for name in SPEED for panel in train if panel.name == name]
    return [
        _Kind("Losses", _merged(_drawable(losses))[:PANELS_SHOWN]),
        _Kind(CHOICES_TITLE, _weights(choices)),
        _Kind(OUTCOME_TITLE, _drawable([p for p in choices if p.name in OUTCOMES])),
        _Kind(EVALUATION_TITLE, _drawable(groups.get("eval", ()))[:PANELS_SHOWN]),
        _Kind(SPEED_TITLE, _drawable(speed)),
    ]


def _drawable(panels: Sequence[Panel]) -> list[Panel]:
    """Return the curves that have at least two points."""
    found = []
    for panel in panels:
        curves = {view: curve for view, curve in panel.curves.items() if len(curve.points) > 1}
        if curves:
            found.append(Panel(panel.name, dict(list(curves.items())[:LINES_PER_PANEL])))
    return found


def _weights(choices: Sequence[Panel]) -> list[Panel]:
    """Join the weights of the kinds of knowledge in one panel, with a curve for each kind."""
    kinds = {panel.name: panel.curves[""] for panel in choices if "" in panel.curves}
    weights = {name: curve for name, curve in kinds.items() if name not in OUTCOMES}
    return _drawable([Panel(WEIGHTS, weights)])


def _merged(panels: Sequence[Panel]) -> list[Panel]:
    """Join panels with equal curves, such as the loss and its only term."""
    found: list[Panel] = []
    for panel in panels:
        same = next((i for i, other in enumerate(found) if _alike(other, panel)), None)
        if same is None:
            found.append(panel)
        else:
            found[same] = Panel(f"{found[same].name} = {panel.name}", panel.curves)
    return found


def _alike(one: Panel, other: Panel) -> bool:
    """Return whether two panels show equal curves up to rounding."""
    return one.curves.keys() == other.curves.keys() and all(
        len(curve.points) == len(other.curves[view].points)
        and all(
            s == t and math.isclose(a, b, rel_tol=1e-5)
            for (s, a), (t, b) in zip(curve.points, other.curves[view].points, strict=True)
        )
        for view, curve in one.curves.items()
    )


def _group(kind: _Kind, stage: str, points: int) -> Iterator[Block]:
    """Yield the charts of one kind with folded numbers; the charts of speed are folded too."""
    whole = "kept" if kind.title == EVALUATION_TITLE else "all"
    views = list(dict.fromkeys(view for panel in kind.panels for view in panel.curves))
    looks = _looks(views)
    charts = [_chart(panel, kind.title, stage, points, looks) for panel in kind.panels]
    legend = [(view or whole, *looks[view]) for view in views] if len(views) > 1 else []
    numbers = Folded("numbers", [_numbers(kind.panels)])
    shown = Figure(charts, f"{kind.title}. {_notes(kind, points)}", legend, [numbers])
    yield Folded(kind.title, [shown]) if kind.title == SPEED_TITLE else shown


def _looks(views: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Return colour and dashing of each view's line; the model itself has the view ""."""
    named = [view for view in views if view]
    last = max(1, len(named) - 1)
    ramp = {view: f"ramp-{i * (RAMP_LENGTH - 1) // last}" for i, view in enumerate(named)}
    whole = ("ink", True) if named else ("student", False)
    return {view: (ramp[view], False) if view else whole for view in views}


def _chart(
    panel: Panel, title: str, stage: str, points: int, looks: Mapping[str, tuple[str, bool]]
) -> Chart:
    lines = [
        Line(thinned(curve.points, points), *looks[view], marked=len(curve.points) <= 15)
        for view, curve in panel.curves.items()
    ]
    unit = _unit(panel.name, title)
    label = f"{title} of stage {stage} over its steps: {panel.name}. {_ends(panel)}".strip()
    bounds = (0.0, 1.0) if title == CHOICES_TITLE else None
    is_share = unit.startswith("%") or panel.name == "learning_rate"
    name = panel.name.replace("_", " ")
    return line_chart(
        lines, title=name, unit=unit, label=label, may_be_log=not is_share, bounds=bounds
    )


def _unit(name: str, title: str) -> str:
    """Return the unit of a value; weights of choices have no unit."""
    last = name.rpartition(" = ")[2]
    if title == EVALUATION_TITLE:
        return "lower is better" if lower_is_better(last) else "%"
    if title in (CHOICES_TITLE, OUTCOME_TITLE):
        return "lower is better" if last == "held_out_loss" else ""
    return "nats" if last.endswith(NATS) else UNITS.get(last, "")


def _ends(panel: Panel) -> str:
    """Return a sentence with the first and the last value of the curve of the model itself."""
    curve = panel.curves.get("")
    if curve is None:
        return ""
    return f"From {curve.points[0][1]:.4g} to {curve.points[-1][1]:.4g}."


def _notes(kind: _Kind, points: int) -> str:
    panels = kind.panels
    curves = [curve for panel in panels for curve in panel.curves.values()]
    notes = ["As logged, not smoothed."]
    if any(len(curve.points) > points for curve in curves):
        notes.append("Of long curves the lowest and highest value of each stretch are drawn.")
    not_finite = sum(curve.not_finite for curve in curves)
    if not_finite:
        notes.append(f"Values left out because they were not finite: {not_finite}.")
    if kind.title == CHOICES_TITLE:
        notes.append("A weight is between 0 (the kind of knowledge is not used) and 1.")
    elif any(view for panel in panels for view in panel.curves):
        notes.append("Each line is a candidate.")
    return " ".join(notes)


def _numbers(panels: Sequence[Panel]) -> Table:
    columns: list[tuple[str, Curve]] = [
        (f"{panel.name} {view}".strip(), curve)
        for panel in panels
        for view, curve in panel.curves.items()
    ][:COLUMNS_SHOWN]
    values = [dict(curve.points) for _, curve in columns]
    steps = sorted({step for column in values for step in column})
    shown = evenly(steps, ROWS_SHOWN)
    rows = [
        [
            f"{step:,}",
            *(f"{v:.4g}" if (v := column.get(step)) is not None else "-" for column in values),
        ]
        for step in shown
    ]
    caption = f"{len(shown):,} of {len(steps):,} steps" if len(shown) < len(steps) else ""
    return Table([["step", *(title for title, _ in columns)], *rows], caption)
