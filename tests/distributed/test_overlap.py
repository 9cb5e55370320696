"""Why gradients are sent during the backward at ZeRO 3, and never at ZeRO 1."""

from __future__ import annotations

import pytest

RIGHT = {"first.weight": 3.0, "second.weight": 1.5}


@pytest.mark.parametrize(
    ("stage", "overlap"), [(1, False), (2, False), (2, True), (3, False), (3, True)]
)
def test_a_weight_that_the_last_backward_does_not_reach_gets_the_mean_gradient(
    workers, stage, overlap
):
    zero = {"stage": stage, "overlap_comm": overlap}

    found = workers(2).run("overlap_cases.update", zero)[0]

    assert found == pytest.approx(RIGHT)


def test_deepspeed_does_not_average_such_a_weight_at_stage_1_with_overlap(workers):
    """The reason to refuse `overlap_comm` at ZeRO 1; once this fails, the refusal can go."""
    zero = {"stage": 1, "overlap_comm": True}

    found = workers(2).run("overlap_cases.update", zero)[0]

    assert found["first.weight"] == pytest.approx(RIGHT["first.weight"])
    assert found["second.weight"] != pytest.approx(RIGHT["second.weight"])
