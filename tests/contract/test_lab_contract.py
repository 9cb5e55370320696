"""Passes that share a backward, and directions of metrics."""

from __future__ import annotations

import pytest

from megakd.config.schema import variants
from megakd.contract.results import lower_is_better
from megakd.contract.stage import Pass, backward_groups
from megakd.contract.terms import TermConfig
from megakd.errors import MegakdError

PLAN = [Pass(teacher=name) for name in "abc"]


@pytest.mark.parametrize(("size", "lengths"), [(None, [3]), (1, [1, 1, 1]), (2, [2, 1]), (5, [3])])
def test_passes_share_a_backward_up_to_the_size(size, lengths):
    groups = backward_groups(PLAN, size)

    assert [len(group) for group in groups] == lengths
    assert [one for group in groups for one in group] == PLAN


@pytest.mark.parametrize("size", [None, 2])
def test_a_step_without_a_pass_is_refused_with_what_to_return(size):
    with pytest.raises(MegakdError, match=r"passes\(\) returned 0 passes .* return a Pass"):
        backward_groups([], size)


def test_lower_is_better_for_losses_and_higher_for_scores():
    assert all(map(lower_is_better, variants(TermConfig, "loss")))
    assert not any(map(lower_is_better, ("accuracy", "top1_agreement", "matthews_correlation")))
