"""`megakd plan` predicts the time and memory of a run: two short runs on CPU ranks."""

from __future__ import annotations

import pytest

from memory import plan


@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 6])
def test_the_predicted_peak_is_within_a_tenth_of_the_measured(run, number):
    """In a process of its own: the plan counts the memory of the process that plans."""
    ended = run("memory.plan", "--cases", str(number))
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


def test_every_case_is_a_run_that_megakd_accepts(tmp_path):
    for number, case in enumerate(plan.CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert plan.config_of(case, folder).train.max_steps == 3
