"""Why gradients are sent during the backward at ZeRO 3, and never at ZeRO 1."""

from __future__ import annotations

import pytest


# DeepSpeed does not average such a weight at stage 1 with overlap, the reason to refuse
# `overlap_comm` there; once that case fails, the refusal can go.
@pytest.mark.parametrize(
    ("stage", "overlap", "is_mean"),
    [
        (1, False, True),
        (1, True, False),
        (2, False, True),
        (2, True, True),
        (3, False, True),
        (3, True, True),
    ],
)
def test_a_weight_that_the_last_backward_does_not_reach_gets_the_mean_gradient(
    workers, stage, overlap, is_mean
):
    change = workers(2).run("overlap_cases.update", stage=stage, overlap_comm=overlap)[0]

    assert change["first.weight"] == pytest.approx(3.0)
    assert (change["second.weight"] == pytest.approx(1.5)) is is_mean
