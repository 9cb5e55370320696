"""The measured weight of the projections: passes, gradients, repeats and resuming."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megakd.methods.mixed_vocabulary import parameter_projections
from megakd.methods.mixed_vocabulary.parameter_projections import (
    CROSS_ENTROPY,
    FAINT,
    NAME,
    Balanced,
)

pytestmark = pytest.mark.usefixtures("process_group")


def engine(*gradients: Iterable[float]) -> Any:
    """A student whose matrix `wide` is compared and whose other weight is not."""
    model = nn.ModuleDict({"wide": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    weights = {name: p for name, p in model.named_parameters() if "weight" in name}
    shards = [
        SimpleNamespace(name=name, gradient=torch.tensor(values))
        for name, values in zip(weights, gradients, strict=True)
    ]
    bundle = SimpleNamespace(modules=lambda: [Group([weights["wide.weight"]])])
    return SimpleNamespace(student=model, bundle=bundle, local_shards=lambda: shards)


class Group:
    def __init__(self, matrices: list[nn.Parameter]) -> None:
        self.matrices = matrices


@pytest.fixture
def balanced(monkeypatch) -> Balanced:
    monkeypatch.setattr(parameter_projections, "ParameterProjections", Group)
    strategy = Balanced(0.3, "teacher")
    strategy.begin(engine([0.0], [0.0]), 0)
    return strategy


def test_the_first_updates_measure_one_term_each_and_the_rest_learn_from_both(balanced):
    seen = []
    for step, gradient in enumerate(([30.0, 40.0], [0.1], [7.0])):
        ours, beside = balanced.passes(step)
        assert (beside.learner, beside.weights) == ("teacher", {NAME: 0.0})
        seen.append(ours.weights)
        balanced.before_update(step, engine(gradient, [1e6]))

    assert seen[:2] == [{CROSS_ENTROPY: 1.0, NAME: FAINT}, {CROSS_ENTROPY: FAINT, NAME: 1.0}]
    assert seen[2] == {NAME: pytest.approx(0.3 * 50.0 / 0.1)}
    assert balanced.scalars()["projections/weight"] == seen[2][NAME]


def test_a_gradient_that_overflows_is_measured_again(balanced):
    balanced.before_update(0, engine([float("inf")], [1.0]))
    assert balanced.passes(1)[0].weights == {CROSS_ENTROPY: 1.0, NAME: FAINT}

    balanced.before_update(1, engine([2.0], [1.0]))
    assert balanced.passes(2)[0].weights == {CROSS_ENTROPY: FAINT, NAME: 1.0}


def test_the_weight_is_kept_when_a_run_goes_on(balanced):
    for step in (0, 1):
        balanced.before_update(step, engine([2.0 + step], [1.0]))
    other = Balanced(0.3, "teacher")

    other.load_state_dict(balanced.state_dict())

    assert other.weight == balanced.weight == pytest.approx(0.3 * 2 / 3)
