"""Numbers from the reports of the evidence: teachers are counted right, weights are means."""

from __future__ import annotations

import pytest
from evidence_reports import selected, teacher_steps


def report(stages: dict[str, int], pool: dict[str, int] | None = None):
    teachers_of_pool = [{"name": name, "steps": steps} for name, steps in (pool or {}).items()]
    return {
        "pool": {"teachers": teachers_of_pool} if pool else None,
        "stages": [{"name": name, "steps": steps} for name, steps in stages.items()],
    }


@pytest.mark.parametrize(
    ("found", "steps"),
    [
        (report({"student": 9}, {"a": 4, "b": 5}), 9),
        (report({"student": 9}, {"a": 9, "b": 9}), 18),
        (report({"pilot-a": 3, "pilot-b": 3, "student": 9}, {"a": 4, "b": 5}), 15),
        (report({"b-taught": 9, "student": 9}), 18),
        (report({"selector": 20, "student": 9}), 29),
    ],
    ids=["drawn", "all", "pilots", "a row", "selector"],
)
def test_a_teacher_is_counted_in_every_step_that_it_answers(found, steps):
    assert teacher_steps(found) == steps


def test_the_weights_of_a_selector_are_their_mean_over_the_students_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "selector", "step": 1, "select/soft": 0.9}\n'
        '{"stage": "student", "step": 1, "select/soft": 0.2, "train/loss": 3}\n'
        '{"stage": "student", "step": 2, "select/soft": 0.4}\n'
    )

    assert selected(tmp_path) == {"soft": pytest.approx(0.3)}
