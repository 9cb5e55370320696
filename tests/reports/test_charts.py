"""Charts as places in a picture: scales, ticks, and where names go."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.reports.charts import (
    BOLD_LETTER,
    BOTTOM,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Curve,
    Dot,
    Scale,
    choice_chart,
    line_chart,
    plane_chart,
    tick,
)
from megakd.reports.page import COLOURS, RAMP_LENGTH


def lines(*curves: list[tuple[float, float]], **options) -> Chart:
    return line_chart(
        [Curve(points, f"ramp-{i}") for i, points in enumerate(curves)],
        **{"title": "loss", "label": "", **options},
    )


def places(chart: Chart) -> list[list[tuple[float, float]]]:
    pairs = [[p.split(",") for p in path.points.split()] for path in chart.paths]
    return [[(float(x), float(y)) for x, y in line] for line in pairs]


def test_a_larger_value_stands_higher_and_all_lines_stay_inside() -> None:
    chart = lines([(1, 3.0), (5, 1.0)], [(1, 2.0), (5, 4.0)])

    (first, last), other = places(chart)[0], places(chart)[1]
    assert first[1] < last[1]
    assert other[1][1] < first[1]
    assert all(
        chart.left <= x <= RIGHT and TOP <= y <= BOTTOM for line in places(chart) for x, y in line
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6, allow_subnormal=False)),
        min_size=1,
        max_size=9,
        unique_by=lambda point: point[0],
    )
)
def test_any_values_have_ticks_inside_in_rising_order(points) -> None:
    chart = lines(sorted(points), may_be_log=True)

    heights = [y for y, _ in chart.y_ticks]
    assert all(TOP - 1 <= y <= BOTTOM + 1 for y in heights)
    assert all(a > b for a, b in itertools.pairwise(heights))
    assert all(chart.left <= x <= RIGHT for x, _ in chart.x_ticks)


def test_ticks_are_round_numbers() -> None:
    assert Scale(low=0.03, high=0.98, start=0, end=1).ticks() == pytest.approx([0.25, 0.5, 0.75])
    assert Scale(low=1, high=40, start=0, end=1).ticks(whole=True) == [10, 20, 30, 40]
    assert Scale(low=1, high=3, start=0, end=1).ticks(whole=True) == [1, 2, 3]
    log = Scale(low=0.9, high=120, start=0, end=1, log=True).ticks()
    assert log == pytest.approx([1, 3, 10, 30, 100])


def test_a_wide_range_is_logarithmic_and_says_so() -> None:
    wide, zero = [(1.0, 100.0), (2.0, 1.0)], [(1.0, 100.0), (2.0, 0.0)]

    assert lines(wide, unit="nats", may_be_log=True).unit == "nats, log scale"
    assert lines(zero, unit="nats", may_be_log=True).unit == "nats"
    assert lines(wide, unit="nats").unit == "nats"


def test_fractions_are_percentages_and_none_is_above_a_hundred() -> None:
    chart = lines([(1, 0.5), (2, 1.0)], unit="%")

    assert [text for _, text in chart.y_ticks] == ["60", "80", "100"]


def test_bounds_are_always_shown() -> None:
    chart = lines([(1, 0.4), (2, 0.5)], bounds=(0.0, 1.0))

    assert [text for _, text in chart.y_ticks][0::2] == ["0", "1"]


def test_the_chosen_candidate_is_marked_with_its_value() -> None:
    points = [(0.5, 0.91), (0.3, 0.9), (0.1, 0.84)]

    chart = choice_chart(points, points[1], title="metric", label="", x_title="scale")

    assert [word.text for word in chart.words] == ["chosen: 0.9000"]
    assert [m.x for m in chart.marks if m.colour == "chosen"] == [chart.rule]
    assert [text for _, text in chart.x_ticks] == ["0.1", "0.3", "0.5"]


def box(word) -> tuple[float, float, float, float]:
    length = BOLD_LETTER * len(word.text)
    start = word.x - {"start": 0, "middle": length / 2, "end": length}[word.anchor]
    return start, word.y - 9, start + length, word.y + 3


def overlap(a, b) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_every_model_is_named_once_and_names_cover_neither_names_nor_dots() -> None:
    dots = [
        Dot("large", "teacher", 1e7, 0.9),
        Dot("huge", "teacher", 2e7, 0.9),
        Dot("student", "student", 1e6, 0.8),
        Dot("alone", "baseline", 1e6, 0.79),
        Dot("direct", "baseline", 1.1e6, 0.8),
    ]

    chart = plane_chart(dots, title="accuracy", unit="%", label="", x_title="size")

    assert [word.text for word in chart.words] == [dot.name for dot in dots]
    boxes = [box(word) for word in chart.words]
    assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    assert all(b[0] >= 0 and b[2] <= WIDTH for b in boxes)
    assert [mark.hollow for mark in chart.marks] == [False, False, False, True, True]


def test_a_lower_perplexity_stands_lower() -> None:
    dots = [Dot("teacher", "teacher", 10, 8.0), Dot("student", "student", 1, 10.0)]

    chart = plane_chart(dots, title="perplexity", unit="", label="", x_title="size")

    assert chart.marks[0].y > chart.marks[1].y
    assert chart.marks[0].x > chart.marks[1].x


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.15, "0.15"), (999, "999"), (1500, "1.5k"), (22.71e6, "22.71M"), (-2e9, "-2B")],
)
def test_numbers_at_axes_are_short(value: float, text: str) -> None:
    assert tick(value) == text


def test_every_colour_stands_out_on_its_page() -> None:
    weak = {
        (name, side)
        for name, pair in COLOURS.items()
        for side in (0, 1)
        if name not in ("paper", "line") and contrast(pair[side], COLOURS["paper"][side]) < 4.5
    }

    assert weak == set()
    assert len({COLOURS[f"ramp-{i}"] for i in range(RAMP_LENGTH)}) == RAMP_LENGTH


def test_four_lines_of_a_chart_have_colours_that_differ() -> None:
    shown = [COLOURS[f"ramp-{i * (RAMP_LENGTH - 1) // 3}"] for i in range(4)]

    for side in (0, 1):
        rgb = [[int(pair[side][i : i + 2], 16) for i in (1, 3, 5)] for pair in shown]
        assert min(math.dist(a, b) for a, b in itertools.combinations(rgb, 2)) > 60


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of relative luminances."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
