"""Charts as places in a picture: scales, ticks, and the numbers of models."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import report_of

from megakd.reports.charts import (
    BOTTOM,
    RIGHT,
    TOP,
    Chart,
    Dot,
    Line,
    Scale,
    line_chart,
    plane_chart,
)
from megakd.reports.html import html_report
from megakd.reports.quantities import short_count


def lines(*curves: list[tuple[float, float]], **options) -> Chart:
    return line_chart(
        [Line(points, f"ramp-{i}") for i, points in enumerate(curves)],
        **{"title": "loss", "label": "", **options},
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6, allow_subnormal=False)),
        min_size=1,
        max_size=9,
        unique_by=lambda point: point[0],
    )
)
def test_any_values_and_their_ticks_are_inside_and_ticks_rise(points) -> None:
    chart = lines(sorted(points), may_be_log=True)
    drawn = [(chart.x(x), chart.y(y)) for x, y in chart.lines[0].points]
    assert all(chart.x.start <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in drawn)
    heights = [y for y, _ in chart.y_ticks]
    assert all(TOP - 1 <= y <= BOTTOM + 1 for y in heights)
    assert all(a > b for a, b in itertools.pairwise(heights))
    assert all(chart.x.start <= x <= RIGHT for x, _ in chart.x_ticks)


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
    assert lines(wide, unit="nats", may_be_log=True, bounds=(0.0, 1.0)).unit == "nats"


def numbers(chart: Chart) -> list[tuple[float, float, float, float]]:
    boxes = [(place, chart.y(dot.y), 7 * len(str(dot.number))) for dot, place in chart.dots]
    return [(x, y - 4, x + width, y + 4) for x, y, width in boxes]


def overlap(a, b) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_fractions_are_percentages_up_to_a_hundred_and_bounds_are_always_shown() -> None:
    percent = lines([(1, 0.5), (2, 1.0)], unit="%")
    bounded = lines([(1, 0.4), (2, 0.5)], bounds=(0.0, 1.0))
    assert [text for _, text in percent.y_ticks] == ["60", "80", "100"]
    assert [text for _, text in bounded.y_ticks][0::2] == ["0", "1"]


def test_numbers_stand_right_of_their_dots_and_do_not_cover_each_other() -> None:
    sizes = (1e7, 2e7, 1e6, 1e6, 1e6, 1.1e6, 1e6, 1e6, 5e6, 5.2e6, 5.4e6)
    values = (0.9, 0.9, 0.8, 0.79, 0.8, 0.8, 0.7, 0.8, 0.85, 0.85, 0.85)
    dots = [
        Dot(number, str(number), "teacher", *place)
        for number, place in enumerate(zip(sizes, values, strict=True), 1)
    ]

    chart = plane_chart(dots, metric="accuracy", measure="size")

    assert [dot for dot, _ in chart.dots] == dots
    assert not any(overlap(a, b) for a, b in itertools.combinations(numbers(chart), 2))
    assert all(chart.x(dot.x) + 6 < place for dot, place in chart.dots)
    assert max(box[2] for box in numbers(chart)) <= 340


@pytest.mark.parametrize("spread", [1.0, 3.0, 100.0, 1e9])
def test_a_scale_of_sizes_has_ticks_that_do_not_touch(spread: float) -> None:
    dots = [Dot(1, "a", "teacher", 3.3e3, 0.5), Dot(2, "b", "student", 3.3e3 * spread, 0.6)]
    ticks = plane_chart(dots, metric="accuracy", measure="size").x_ticks
    assert len(ticks) > 1
    boxes = [(x - 3 * len(text), x + 3 * len(text)) for x, text in ticks]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(boxes))


def test_a_lower_perplexity_stands_lower() -> None:
    dots = [Dot(1, "teacher", "teacher", 10, 8.0), Dot(2, "student", "student", 1, 10.0)]

    chart = plane_chart(dots, metric="perplexity", measure="size")

    assert chart.y(8.0) > chart.y(10.0)
    assert chart.x(10) > chart.x(1)
    assert chart.unit == "lower is better"
    assert chart.label == "perplexity against size: teacher 8.000 at 10, student 10.000 at 1."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.15, "0.15"),
        (999, "999"),
        (1500, "1.5k"),
        (999_999, "1M"),
        (22.71e6, "22.71M"),
        (-2e9, "-2B"),
        (5e12, "5000B"),
    ],
)
def test_numbers_at_axes_are_short(value: float, text: str) -> None:
    assert short_count(value, ".4g") == text


@pytest.fixture(scope="module", params=["light", "dark"])
def colours(request: pytest.FixtureRequest) -> dict[str, str]:
    """The colours of the page by name."""
    rules = re.findall(r":root \{ .*", html_report(report_of(), []))
    return dict(re.findall(r"--([\w-]+): (#\w{6});", rules[request.param == "dark"]))


def test_every_colour_stands_out_on_its_page(colours: dict[str, str]) -> None:
    words = {name: colour for name, colour in colours.items() if name not in ("paper", "line")}
    assert {n for n, c in words.items() if contrast(c, colours["paper"]) < 4.5} == set()
    assert {"teacher", "assistant", "student", "baseline", "chosen"} < set(words)
    assert len({colours[f"ramp-{i}"] for i in range(12)}) == 12


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of relative luminances."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
