"""metrics.jsonl as curves: what is read and what is passed over."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megakd.reports.report_file import curves_of, read_history


def line(step: int, stage: str = "student", **scalars: float | None) -> dict:
    return {"stage": stage, "step": step, "time": 1.0, **scalars}


def test_numbers_become_curves_by_stage_and_key() -> None:
    history = [
        line(10, **{"train/loss": 2.0, "eval/view/f1": 0.1}),
        line(20, **{"train/loss": 1.0}),
        line(5, "teacher", **{"train/loss": 3.0}),
    ]

    assert curves_of(history) == {
        "student": {"train/loss": [(10, 2.0), (20, 1.0)], "eval/view/f1": [(10, 0.1)]},
        "teacher": {"train/loss": [(5, 3.0)]},
    }


def test_a_step_that_comes_again_counts_as_it_was_last_logged() -> None:
    steps = [(10, 1.0), (20, 9.0), (30, 9.0), (20, 2.0), (30, 3.0)]
    result = curves_of(line(step, **{"train/loss": value}) for step, value in steps)
    assert result["student"]["train/loss"] == [(10, 1.0), (20, 2.0), (30, 3.0)]


def test_values_that_are_not_finite_are_left_out() -> None:
    values = [1.0, None, math.nan, math.inf, -math.inf, 10**400, 2.0]
    result = curves_of(line(i, **{"train/loss": value}) for i, value in enumerate(values))
    assert result["student"]["train/loss"] == [(0, 1.0), (6, 2.0)]


def test_damaged_and_half_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a"\n[1]\n' + json.dumps({"step": 1}) + '\n{"step": 2, "tr')
    assert list(read_history(path)) == [{"step": 1}]
    assert list(read_history(tmp_path / "no such file")) == []
    assert curves_of([{"stage": "a", "step": 10**400, "train/loss": 1.0}]) == {}
