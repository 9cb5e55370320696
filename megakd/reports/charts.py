"""The geometry of the report's charts: positions in a small SVG, which the template draws.

All charts have the width of a phone's screen, so that no chart has to be scaled down; a wide page
shows several charts side by side. Positions are in units of the view box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

WIDTH, HEIGHT = 340, 214
TOP, BOTTOM, RIGHT = 10, 176, 328
LETTER, BOLD_LETTER, LINE = 6.3, 7.4, 12.0
"""Approximate width of a letter and of a bold letter, and height of a line of text."""
LOG_FROM = 8.0
"""Positive values get a logarithmic scale if maximum / minimum exceeds this ratio."""
TICKS = 4
SMALLEST = 1e-300
"""Lower limit of the span of a scale, and of the start of a logarithmic scale."""

Point = tuple[float, float]
Box = tuple[float, float, float, float]


class Dot(NamedTuple):
    """A model in a scatter chart; `kind` is teacher, assistant, student or baseline."""

    name: str
    kind: str
    x: float
    y: float


class Curve(NamedTuple):
    """A line through points; `colour` names a colour of the page."""

    points: Sequence[Point]
    colour: str
    dashed: bool = False
    marked: bool = False


class Mark(NamedTuple):
    """A drawn dot."""

    x: float
    y: float
    colour: str
    hollow: bool
    radius: float


class Word(NamedTuple):
    """A drawn text; `anchor` is start, middle or end."""

    x: float
    y: float
    anchor: str
    colour: str
    text: str


class Path(NamedTuple):
    """A drawn line."""

    points: str
    colour: str
    dashed: bool


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A mapping from values of an axis to positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        low, high, value = ((math.log(v) if self.log else v) for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)

    def ticks(self, *, whole: bool = False) -> list[float]:
        """Return round values within the scale; `whole` allows only integers."""
        return self._decades() if self.log else self._steps(whole=whole)

    def _steps(self, *, whole: bool) -> list[float]:
        raw = (self.high - self.low) / TICKS
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= raw * (1 - 1e-9))
        step = max(1.0, round(step)) if whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _decades(self) -> list[float]:
        decades = math.log10(self.high) - math.log10(self.low)
        subs = (1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0) if decades < 3 else (1.0,)
        every = max(1, math.ceil(decades / 6))
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [s * 10.0**p for p in powers if p % every == 0 for s in subs]
        return [value for value in found if self.low <= value <= self.high]


@dataclass(kw_only=True)
class Chart:
    """One chart, ready to be drawn.

    title: title of the chart; `unit` follows the title.
    label: description of the chart in words, for screen readers.
    x_title: title of the x axis.
    """

    title: str
    unit: str
    label: str
    x_title: str
    left: float
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    paths: list[Path] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    rule: float | None = None
    size: Point = (WIDTH, HEIGHT)
    top: float = TOP
    bottom: float = BOTTOM
    right: float = RIGHT


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    unit: str = "",
    label: str,
    may_be_log: bool = False,
    bounds: tuple[float, float] | None = None,
) -> Chart:
    """Return a chart of lines over the steps of training.

    Args:
        curves: at least one curve, with at least one point each.
        title: title of the chart.
        unit: unit of the values; with a per cent sign, fractions are shown as percentages.
        label: description of the chart in words.
        may_be_log: whether a wide range of values gets a logarithmic scale.
        bounds: values that the y axis always contains.
    """
    xs, ys = _values(curves, 0), [*_values(curves, 1), *(bounds or ())]
    log = may_be_log and min(ys) > 0 and max(ys) / min(ys) > LOG_FROM
    y, y_ticks, left = _vertical(ys, log=log, percent=unit.startswith("%"))
    x = Scale(low=min(xs), high=max(*xs, min(xs) + 1e-9), start=left + 6, end=RIGHT - 6)
    x_ticks = [(x(value), tick(value)) for value in x.ticks(whole=True)]
    words = ", ".join(part for part in (unit, "log scale" if log else "") if part)
    chart = Chart(
        title=title, unit=words, label=label, x_title="step", left=left,
        x_ticks=x_ticks, y_ticks=y_ticks,
    )  # fmt: skip
    _draw(chart, curves, x, y)
    return chart


def choice_chart(
    points: Sequence[Point], chosen: Point, *, title: str, label: str, x_title: str
) -> Chart:
    """Return a chart of one value per candidate, with a tick for each and the chosen one marked.

    Args:
        points: (x, y) of the candidates.
        chosen: the point of the chosen candidate.
        title: title of the y values.
        label: description of the chart in words.
        x_title: title of the x axis.
    """
    xs = [x for x, _ in points]
    y, y_ticks, left = _vertical([value for _, value in points], headroom=0.25)
    pad = 0.06 * (max(xs) - min(xs)) or 0.05
    x = Scale(low=min(xs) - pad, high=max(xs) + pad, start=left, end=RIGHT)
    ticks = _apart([(x(value), f"{value:.3g}") for value in sorted(xs)])
    chart = Chart(
        title=title, unit="", label=label, x_title=x_title, left=left, x_ticks=ticks,
        y_ticks=y_ticks, rule=x(chosen[0]),
    )  # fmt: skip
    _draw(chart, [Curve(sorted(points), "student", marked=True)], x, y)
    place = x(chosen[0]), y(chosen[1])
    chart.marks.append(Mark(*place, "chosen", hollow=False, radius=5.5))
    is_left = place[0] < (left + RIGHT) / 2
    side = (6, "start") if is_left else (-6, "end")
    chart.words.append(
        Word(place[0] + side[0], TOP + 10, side[1], "chosen", f"chosen: {chosen[1]:.4f}")
    )
    return chart


def plane_chart(dots: Sequence[Dot], *, title: str, unit: str, label: str, x_title: str) -> Chart:
    """Return a scatter chart of named models over a measure of size on a logarithmic scale.

    Args:
        dots: at least one model; all x values are positive.
        title: title of the y values.
        unit: unit of the y values.
        label: description of the chart in words.
        x_title: name of the measure of size.
    """
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    y, y_ticks, left = _vertical(ys, headroom=0.15, percent=unit.startswith("%"))
    spread = max((max(xs) / min(xs)) ** 0.12, 1.3)
    x = Scale(low=min(xs) / spread, high=max(xs) * spread, start=left, end=RIGHT, log=True)
    ticks = _apart([(x(value), tick(value)) for value in x.ticks()])
    chart = Chart(
        title=title, unit=unit, label=label, x_title=f"{x_title}, log scale", left=left,
        x_ticks=ticks, y_ticks=y_ticks,
    )  # fmt: skip
    for dot in dots:
        hollow = dot.kind == "baseline"
        chart.marks.append(Mark(x(dot.x), y(dot.y), dot.kind, hollow=hollow, radius=5))
    chart.words += _names(dots, [(mark.x, mark.y) for mark in chart.marks], left)
    return chart


def _values(curves: Iterable[Curve], axis: int) -> list[float]:
    return [point[axis] for curve in curves for point in curve.points]


def _vertical(
    values: Sequence[float], *, log: bool = False, percent: bool = False, headroom: float = 0.06
) -> tuple[Scale, list[tuple[float, str]], float]:
    """Return the scale of the y axis, its ticks, and the left edge of the chart's area."""
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
    factor = 100 if percent else 1
    # Fractions do not exceed 1, although the axis has a little room above 1.
    shown = [value for value in scale.ticks() if not percent or value < 1 + 1e-9]
    ticks = [(scale(value), tick(factor * value)) for value in shown]
    return scale, ticks, 10 + LETTER * max((len(text) for _, text in ticks), default=0)


def _draw(
    chart: Chart,
    curves: Sequence[Curve],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> None:
    for curve in curves:
        places = [(x(a), y(b)) for a, b in curve.points]
        text = " ".join(f"{a:g},{b:g}" for a, b in places)
        chart.paths.append(Path(text, curve.colour, curve.dashed))
        if curve.marked:
            chart.marks += [Mark(a, b, curve.colour, hollow=False, radius=2.5) for a, b in places]


def _apart(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Remove the text of ticks that would touch the text of the previous tick."""
    found: list[tuple[float, str]] = []
    end = -math.inf
    for place, text in ticks:
        half = LETTER * len(text) / 2
        fits = place - half > end + 3
        found.append((place, text if fits else ""))
        end = place + half if fits else end
    return found


def _names(dots: Sequence[Dot], places: Sequence[Point], left: float) -> list[Word]:
    """Return the models' names, each placed beside its dot where the name covers the least."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    words = []
    for dot, (x, y) in zip(dots, places, strict=True):
        name = dot.name if len(dot.name) <= 20 else f"{dot.name[:19]}…"
        length = BOLD_LETTER * len(name)
        offers = [
            (x + dx, y + dy, anchor)
            for dy in (4, -8, 16, -20, 28)
            for dx, anchor in ((9, "start"), (-9, "end"), (0, "middle"))
            if dy != 4 or dx
        ]
        boxes = [_box(offer, length) for offer in offers]
        costs = [_cost(box, taken, left) + 0.1 * i for i, box in enumerate(boxes)]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        place, height, anchor = offers[best]
        words.append(Word(place, height, anchor, dot.kind, name))
    return words


def _box(offer: tuple[float, float, str], length: float) -> Box:
    x, y, anchor = offer
    start = x - {"start": 0.0, "middle": length / 2, "end": length}[anchor]
    return start, y - LINE + 3, start + length, y + 3


def _cost(box: Box, taken: Sequence[Box], left: float) -> float:
    """Return the cost of a position: the covered area, and the parts outside the chart."""
    outside = max(0.0, left - box[0]) + max(0.0, box[2] - WIDTH)
    above = max(0.0, -box[1]) + max(0.0, box[3] - BOTTOM)
    return sum(_overlap(box, other) for other in taken) + LINE * outside + 60 * above


def _overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    up = min(one[3], other[3]) - max(one[1], other[1])
    return across * up if across > 0 and up > 0 else 0.0


def tick(value: float) -> str:
    """Return a short text of a number, such as 20k or 0.15."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"
