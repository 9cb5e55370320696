"""The part of a report about training: losses, evaluations and speed, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from megakd.report_history import Curve, Panel, evenly
from megakd.report_page import figure, folded, paragraph, section, table
from megakd.report_plots import LINES_PER_PANEL, curves_picture, unit_of

STAGES_SHOWN = 20
PANELS_SHOWN = 6
ROWS_SHOWN = 15
COLUMNS_SHOWN = 24
POINTS_ON_THE_PAGE = 24_000
POINTS_PER_LINE = (24, 300)
SELECTION = "select"
"""The group of what a strategy logs of its own choices."""
SPEED = ("learning_rate", "gradient_norm", "tokens_per_s", "teacher_share", "data_share")
NOT_DRAWN = ("step_seconds", "memory_bytes")  # as tokens_per_s and the peak of a stage say it
UNITS = {
    "loss": "weighted sum",
    "top1_agreement": "%",
    "learning_rate": "step size",
    "gradient_norm": "L2 norm",
    "tokens_per_s": "tokens/s",
    "teacher_share": "% of the time",
    "data_share": "% of the time",
}
NATS = ("_kl", "_jsd", "_cross_entropy")

Groups = Mapping[str, Sequence[Panel]]


class _Kind(NamedTuple):
    """One picture of a stage."""

    title: str
    panels: list[Panel]


def training_sections(stages: Mapping[str, Groups], names: Sequence[str]) -> Iterator[str]:
    """Each stage's curves, those stages first that the report names.

    Args:
        stages: what was logged, see `report_history.panels`.
        names: of the stages, in their order.
    """
    order = [*(name for name in names if name in stages), *(n for n in stages if n not in names)]
    kinds = {name: [kind for kind in _kinds(stages[name]) if kind.panels] for name in order}
    shown = [name for name in order if kinds[name]][:STAGES_SHOWN]
    lines = sum(len(panel.curves) for n in shown for kind in kinds[n] for panel in kind.panels)
    low, high = POINTS_PER_LINE
    points = max(low, min(high, POINTS_ON_THE_PAGE // max(1, lines)))
    for number, name in enumerate(shown):
        parts = [_group(kind, name, f"stage-{number}", points) for kind in kinds[name]]
        yield section(name, *parts, level=3)
    left_out = sum(bool(kinds[name]) for name in order) - len(shown)
    if left_out:
        yield paragraph(f"{left_out} more stages are in metrics.jsonl.", muted=True)


def _kinds(groups: Groups) -> list[_Kind]:
    train = groups.get("train", ())
    losses = [panel for panel in train if panel.name not in (*SPEED, *NOT_DRAWN)]
    speed = [panel for name in SPEED for panel in train if panel.name == name]
    return [
        _Kind("Losses", _merged(_drawable(losses))[:PANELS_SHOWN]),
        _Kind("Choices", _drawable(groups.get(SELECTION, ()))[:PANELS_SHOWN]),
        _Kind("Evaluation", _drawable(groups.get("eval", ()))[:PANELS_SHOWN]),
        _Kind("Speed and step size", _drawable(speed)),
    ]


def _drawable(panels: Sequence[Panel]) -> list[Panel]:
    """The curves that are any: two points and more."""
    found = []
    for panel in panels:
        curves = {view: curve for view, curve in panel.curves.items() if len(curve.points) > 1}
        if curves:
            found.append(Panel(panel.name, dict(list(curves.items())[:LINES_PER_PANEL])))
    return found


def _merged(panels: Sequence[Panel]) -> list[Panel]:
    """Panels of the same curves become one: the loss of a single term is that term."""
    found: list[Panel] = []
    for panel in panels:
        same = next((i for i, other in enumerate(found) if other.curves == panel.curves), None)
        if same is None:
            found.append(panel)
        else:
            found[same] = Panel(f"{found[same].name} = {panel.name}", panel.curves)
    return found


def _group(kind: _Kind, stage: str, name: str, points: int) -> str:
    """One picture and, folded, its numbers; all of it folded where it is not about quality."""
    named = ", ".join(panel.name for panel in kind.panels)
    units = {panel.name: _unit(panel.name, kind.title) for panel in kind.panels}
    label = f"{kind.title} of stage {stage} over its steps: {named}. {_ends(kind.panels)}"
    picture_name = f"{name}-{kind.title.split()[0].lower()}"
    drawn = curves_picture(kind.panels, points=points, name=picture_name, label=label, units=units)
    numbers = folded("numbers", _numbers(kind.panels))
    shown = figure(drawn, f"{kind.title}. {_notes(kind.panels, points)}", numbers)
    return folded(kind.title, shown) if kind.title.startswith("Speed") else shown


def _unit(name: str, title: str) -> str:
    last = name.rpartition(" = ")[2]
    if title == "Evaluation":
        return unit_of(last)
    return "nats" if last.endswith(NATS) else UNITS.get(last, "")


def _ends(panels: Sequence[Panel]) -> str:
    """First and last value of each curve of the model itself."""
    words = [
        f"{panel.name} from {curve.points[0][1]:.4g} to {curve.points[-1][1]:.4g}"
        for panel in panels
        for view, curve in panel.curves.items()
        if not view
    ]
    return "; ".join(words) + "." if words else ""


def _notes(panels: Sequence[Panel], points: int) -> str:
    curves = [curve for panel in panels for curve in panel.curves.values()]
    notes = ["As logged, not smoothed."]
    if any(len(curve.points) > points for curve in curves):
        notes.append("Of long curves the lowest and highest value of each stretch are drawn.")
    not_finite = sum(curve.not_finite for curve in curves)
    if not_finite:
        notes.append(f"{not_finite} values that were not finite are left out.")
    if any(view for panel in panels for view in panel.curves):
        notes.append("Each line is a candidate.")
    return " ".join(notes)


def _numbers(panels: Sequence[Panel]) -> str:
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
    return table([["step", *(title for title, _ in columns)], *rows], caption=caption)
