"""The charts of the report: scales and values, which `templates/chart.svg.jinja` draws.

All charts have the width of a phone's screen, so that no chart has to be scaled down; a wide page
shows several charts side by side. Positions are in units of the view box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megakd.contract.metric import lower_is_better
from megakd.contract.results import CandidateReport
from megakd.reports.quantities import short_count
from megakd.reports.table import score

TOP, BOTTOM, RIGHT = 10, 176, 322
LETTER = 6.3
"""Approximate width of a letter."""
SMALLEST = 1e-300
"""Lower limit of the span of a scale, and of the start of a logarithmic scale."""

Point = tuple[float, float]
Ticks = list[tuple[float, str]]


class Line(NamedTuple):
    """A line through points; `colour` names a colour of the page."""

    points: Sequence[Point]
    colour: str
    dashed: bool = False
    marked: bool = False


class Dot(NamedTuple):
    """A model in a scatter chart with its number in the legend.

    kind: teacher, assistant, student or baseline; the kind is the name of the dot's colour.
    """

    number: int
    name: str
    kind: str
    x: float
    y: float

    @property
    def look(self) -> str:
        """The class of the dot in `templates/charts.css`."""
        return "hollow" if self.kind == "baseline" else "dot"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A mapping from values of an axis to positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = ((math.log(v) if self.log else v) for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)

    def ticks(self, *, whole: bool = False) -> list[float]:
        """Return round values within the scale; `whole` allows only integers."""
        # Within half a decade, there may be no round power, and steps are almost even.
        if self.log and math.log10(self.high) - math.log10(self.low) > 0.5:
            return self._decades()
        raw = (self.high - self.low) / 4
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= raw * (1 - 1e-9))
        step = max(1.0, round(step)) if whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _decades(self) -> list[float]:
        low, high = math.log10(self.low), math.log10(self.high)
        decades = high - low
        subs = (1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0) if decades < 3 else (1.0,)
        every = max(1, math.ceil(decades / 6))
        powers = [p for p in range(math.floor(low), math.ceil(high) + 1) if p % every == 0]
        return [v for p in powers for s in subs if self.low <= (v := s * 10.0**p) <= self.high]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart: its scales, and the values to draw.

    x_ticks, y_ticks: position and text of each tick.
    dots: each dot with the position of its number.
    chosen: the point of the chosen candidate.
    """

    title: str
    unit: str = ""
    label: str
    x_title: str = "step"
    x: Scale
    y: Scale
    x_ticks: Ticks
    y_ticks: Ticks
    lines: Sequence[Line] = ()
    dots: Sequence[tuple[Dot, float]] = ()
    chosen: Point | None = None


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    unit: str = "",
    label: str,
    may_be_log: bool = False,
    bounds: Sequence[float] = (),
) -> Chart:
    """Return a chart of lines, each with at least one point, over the steps of training.

    With a per cent sign in `unit`, fractions are shown as percentages. A wide range may get a
    logarithmic scale (`may_be_log`). The y axis always contains `bounds`.
    """
    xs, ys = ([point[axis] for line in lines for point in line.points] for axis in (0, 1))
    ys = [*ys, *bounds]
    log = may_be_log and min(ys) > 0 and max(ys) / min(ys) > 8
    y, y_ticks = _vertical(ys, log=log, percent=unit.startswith("%"))
    x = _horizontal(min(xs), max(*xs, min(xs) + 1e-9), y_ticks)
    return Chart(
        title=title, unit=", ".join(filter(None, (unit, "log scale" if log else ""))), label=label,
        x=x, y=y, x_ticks=[(x(value), short_count(value, ".4g")) for value in x.ticks(whole=True)],
        y_ticks=y_ticks, lines=lines,
    )  # fmt: skip


def choice_charts(rows: Sequence[CandidateReport], chosen: CandidateReport) -> list[Chart]:
    """Return charts of metric and trade-off by scale, with a tick for each candidate."""
    charts: list[Chart] = []
    for title, key in (("metric", "metric"), ("trade-off", "tradeoff")):
        points = sorted((1 - row["sparsity"], row[key]) for row in rows)
        first, last = points[0][0], points[-1][0]
        y, y_ticks = _vertical([value for _, value in points], headroom=0.25)
        pad = 0.06 * (last - first) or 0.05
        x = _horizontal(first - pad, last + pad, y_ticks)
        label = (
            f"{title} of {len(rows)} candidates of iteration {chosen['iteration']} against their "
            f"scale. Chosen: sparsity {chosen['sparsity']:g}, {title} {chosen[key]:.4f}."
        )
        charts.append(Chart(
            title=title, label=label, x_title="scale (1 \N{MINUS SIGN} sparsity)", x=x, y=y,
            x_ticks=_apart([(x(scale), f"{scale:.3g}") for scale, _ in points]), y_ticks=y_ticks,
            lines=[Line(points, "student", marked=True)],
            chosen=(1 - chosen["sparsity"], chosen[key]),
        ))  # fmt: skip
    return charts


def plane_chart(dots: Sequence[Dot], *, metric: str, measure: str) -> Chart:
    """Return a scatter chart of numbered models by a metric and a size, which is positive."""
    is_low = lower_is_better(metric)
    xs = [dot.x for dot in dots]
    y, y_ticks = _vertical([dot.y for dot in dots], headroom=0.15, percent=not is_low)
    spread = max((max(xs) / min(xs)) ** 0.12, 1.3)
    x = _horizontal(min(xs) / spread, max(xs) * spread, y_ticks, log=True)
    words = (f"{d.name} {score(metric, d.y)} at {short_count(d.x, '.4g')}" for d in dots)
    return Chart(
        title=metric, unit="lower is better" if is_low else "%",
        label=f"{metric} against {measure}: {', '.join(words)}.", x_title=f"{measure}, log scale",
        x=x, y=y, x_ticks=[(x(value), short_count(value, ".4g")) for value in x.ticks()],
        y_ticks=y_ticks, dots=_numbered(dots, x, y),
    )  # fmt: skip


def _numbered(dots: Sequence[Dot], x: Scale, y: Scale) -> list[tuple[Dot, float]]:
    # Numbers stand right of their dots, on free space.
    numbered: list[tuple[Dot, float]] = []
    for dot in dots:
        place = x(dot.x) + 8
        for other, start in sorted(numbered, key=lambda pair: pair[1]):
            end = start + 4 + 7 * len(str(other.number))
            is_level = abs(y(other.y) - y(dot.y)) < 9
            place = end if is_level and start - 8 < place < end else place
        numbered.append((dot, round(place, 1)))
    return numbered


def _vertical(
    values: Sequence[float], *, log: bool = False, percent: bool = False, headroom: float = 0.06
) -> tuple[Scale, Ticks]:
    low, high = min(values), max(values)
    if log:
        factor = math.exp(0.06 * (math.log(high) - math.log(low)))
        low, high = max(low / factor, SMALLEST), min(high * factor, 1 / SMALLEST)
    else:
        is_flat = high - low <= max(1e-9 * max(abs(low), abs(high)), SMALLEST)
        pad = 0.05 * abs(high) if is_flat else headroom * (high - low)
        pad = pad if pad > SMALLEST else 0.5
        low, high = low - pad, high + pad
    scale = Scale(low=low, high=high, start=BOTTOM, end=TOP, log=log)
    # Fractions do not exceed 1, although the axis has a little room above 1.
    shown = [value for value in scale.ticks() if not percent or value < 1 + 1e-9]
    return scale, [(scale(v), short_count(v * (100 if percent else 1), ".4g")) for v in shown]


def _horizontal(low: float, high: float, y_ticks: Ticks, *, log: bool = False) -> Scale:
    # Begins right of the texts of the y axis.
    start = round(16 + LETTER * max((len(text) for _, text in y_ticks), default=0), 1)
    return Scale(low=low, high=high, start=start, end=RIGHT, log=log)


def _apart(ticks: Ticks) -> Ticks:
    apart: Ticks = []
    end = -math.inf
    for place, text in ticks:
        half = LETTER * len(text) / 2
        fits = place - half > end + 3
        apart.append((place, text if fits else ""))
        end = place + half if fits else end
    return apart
