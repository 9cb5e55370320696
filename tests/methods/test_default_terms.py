"""The loss terms of a method whose config has no objective."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from megakd.config.rollout import RolloutConfig
from megakd.contract.terms import hard_terms, soft_terms
from megakd.methods import single


@pytest.mark.parametrize(
    ("rollout", "terms"),
    [
        (None, {"hard_cross_entropy": 0.5, "soft_target_kl": 0.5}),
        ({}, {"soft_target_kl": 1.0}),
        ({"mix": 0.2}, {"soft_target_kl": 1.0}),
    ],
    ids=["data", "texts", "texts and data"],
)
def test_single_learns_generated_texts_with_soft_targets_alone(rollout, terms):
    texts = None if rollout is None else RolloutConfig(max_new_tokens=4, **rollout)
    lab: Any = SimpleNamespace(
        config=SimpleNamespace(objective=None, rollout=texts),
        teacher=lambda name: "teacher",
        train=lambda stage: stage,
        hard_terms=partial(hard_terms, "causal_lm"),
        soft_terms=partial(soft_terms, "causal_lm"),
    )

    stage: Any = single.run(single.SingleConfig(name="single"), lab)

    assert {term.loss: term.weight for term in stage.objective} == terms
