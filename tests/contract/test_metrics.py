"""Directions of metrics."""

from __future__ import annotations

import pytest

from megakd.config.schema import variants
from megakd.contract.metric import lower_is_better
from megakd.contract.terms import TermConfig


@pytest.mark.parametrize("name", variants(TermConfig, "loss"))
def test_lower_is_better_for_every_loss_that_an_evaluation_measures(name):
    assert lower_is_better(name)


@pytest.mark.parametrize("name", ["accuracy", "top1_agreement", "matthews_correlation"])
def test_higher_is_better_for_scores(name):
    assert not lower_is_better(name)
