"""Charts of generated texts by position: divergence and entropies along the texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from megakd.contract.tasks import BY_POSITION
from megakd.reports.charts import Chart, Line, line_chart
from megakd.reports.curves import Figure
from megakd.reports.history import Curve, Panels
from megakd.reports.table import Rows

POSITIONS = "Generated texts by position"
NOTE = "The means over the tokens of the generated texts at these positions."
TITLES = {"kl": "KL(teacher‖student)", "entropy": "student entropy"}


class Bucket(NamedTuple):
    """Positions `first` to `last` of the generated tokens, counted from 0."""

    first: int
    last: int

    @property
    def middle(self) -> float:
        """The position that stands for the bucket."""
        return (self.first + self.last) / 2


Values = Mapping[Bucket, Mapping[int, float]]
"""Values of one statistic, by bucket and by step."""


def position_figures(groups: Mapping[str, Panels], stage: str) -> list[Figure]:
    """Return the charts of a stage's generated texts by position; none without two buckets.

    Args:
        groups: logged values of the stage by group, see `history.panels`.
        stage: name of the stage.
    """
    named = {name: _values(curves) for name, curves in groups.get(BY_POSITION, {}).items()}
    named = {name: values for name, values in named.items() if len(values) > 1}
    steps = sorted({s for values in named.values() for found in values.values() for s in found})
    if not steps:
        return []
    shown = list(dict.fromkeys((steps[0], steps[-1])))
    legend = [(f"step {shown[-1]:,}", "student", "")]
    legend += [(f"step {step:,}", "baseline", "dashed") for step in shown[:-1]]
    numbers = _numbers(named, shown)
    charts = [_chart(name, values, shown, stage) for name, values in named.items()]
    return [
        Figure(POSITIONS, charts, legend, NOTE, False, False, 0, numbers, len(numbers) - 1)  # noqa: FBT003
    ]


def _values(curves: Mapping[str, Curve]) -> Values:
    found: dict[Bucket, Mapping[int, float]] = {}
    for view, curve in curves.items():
        first, _, last = view.partition("-")
        if first.isdecimal() and last.isdecimal() and curve.points:
            found[Bucket(int(first), int(last))] = dict(curve.points)
    return dict(sorted(found.items()))


def _chart(name: str, values: Values, steps: Sequence[int], stage: str) -> Chart:
    lines = [_line(values, step, is_last=step == steps[-1]) for step in reversed(steps)]
    title = TITLES.get(name, name.replace("_", " "))
    drawn = line_chart(
        [line for line in lines if line.points],
        title=title,
        unit="nats",
        label=f"{title} of the texts of stage {stage} over the position of the token.",
    )
    return replace(drawn, x_title="position of the token")


def _line(values: Values, step: int, *, is_last: bool) -> Line:
    points = [(bucket.middle, found[step]) for bucket, found in values.items() if step in found]
    return Line(points, "student" if is_last else "baseline", dashed=not is_last, marked=True)


def _numbers(named: Mapping[str, Values], steps: Sequence[int]) -> Rows:
    columns = [(name, step) for name in named for step in steps]
    titles = [
        f"{TITLES.get(name, name.replace('_', ' '))}, step {step:,}" for name, step in columns
    ]
    rows = [["position", *titles]]
    for bucket in sorted({bucket for values in named.values() for bucket in values}):
        found = (named[name].get(bucket, {}).get(step) for name, step in columns)
        cells = ("-" if value is None else f"{value:.4g}" for value in found)
        rows.append([f"{bucket.first:,}-{bucket.last:,}", *cells])
    return rows
