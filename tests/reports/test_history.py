"""metrics.jsonl as curves: what is read, what is passed over, what is left when thinned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.reports.history import Curve, evenly, panels, read_history, thinned


def line(step: int, stage: str = "student", **scalars: float | None) -> dict:
    return {"stage": stage, "step": step, "time": 1.0, **scalars}


def test_numbers_become_curves_by_stage_group_and_name() -> None:
    history = [
        line(10, **{"train/loss": 2.0, "train/learning_rate": 0.1}),
        line(10, **{"eval/accuracy": 0.5}),
        line(20, **{"train/loss": 1.0}),
        line(5, "teacher", **{"train/loss": 3.0}),
    ]

    result = panels(history)

    assert list(result) == ["student", "teacher"]
    assert list(result["student"]["train"]) == ["loss", "learning_rate"]
    assert result["student"]["train"]["loss"] == {"": Curve(((10, 2.0), (20, 1.0)))}
    assert result["student"]["eval"]["accuracy"] == {"": Curve(((10, 0.5),))}


def test_views_of_a_number_share_a_panel_in_the_order_of_their_numbers() -> None:
    views = ("sparsity-0.9", "sparsity-0.85", "sparsity-0.5")
    history = [line(1, **{f"eval/{view}/f1": 0.5 for view in views}, **{"eval/f1": 0.6})]
    shown = panels(history)["student"]["eval"]
    assert list(shown) == ["f1"]
    assert list(shown["f1"]) == ["", "sparsity-0.5", "sparsity-0.85", "sparsity-0.9"]


def test_a_step_that_comes_again_counts_as_it_was_last_logged() -> None:
    steps = [(10, 1.0), (20, 9.0), (30, 9.0), (20, 2.0), (30, 3.0)]
    result = panels(line(step, **{"train/loss": value}) for step, value in steps)
    assert result["student"]["train"]["loss"][""].points == ((10, 1.0), (20, 2.0), (30, 3.0))


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    values = [1.0, None, math.nan, math.inf, -math.inf, 10**400, 2.0]
    result = panels(line(i, **{"train/loss": value}) for i, value in enumerate(values))
    assert result["student"]["train"]["loss"][""] == Curve(((0, 1.0), (6, 2.0)), 5)


def test_damaged_and_half_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a"\n[1]\n' + json.dumps({"step": 1}) + '\n{"step": 2, "tr')
    assert list(read_history(path)) == [{"step": 1}]
    assert list(read_history(tmp_path / "no such file")) == []


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200), st.integers(4, 60))
def test_a_thinned_curve_keeps_its_ends_its_extremes_and_its_order(values, limit):
    points = list(enumerate(values))

    kept = list(thinned(points, limit))

    assert len(kept) <= max(limit, 4)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {min(v for _, v in kept), max(v for _, v in kept)} == {min(values), max(values)}
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert set(kept) <= set(points)


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_evenly_spread_items_keep_both_ends(length: int) -> None:
    result = evenly(range(length), 5)
    assert len(result) == min(length, 5)
    assert (result[0], result[-1]) == (0, length - 1)
    assert result == sorted(set(result))
