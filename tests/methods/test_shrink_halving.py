"""The trial of shrink: which candidates learn to the end."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megakd.methods.shrink.halving import Halving

KL = "soft_target_kl"
SIX = ("a", "b", "c", "d", "e", "f")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr("megakd.methods.shrink.halving.all_reduce_", lambda losses: losses)


def learn(halving: Halving, steps: range, losses: dict[str, float]) -> list[str]:
    """Take steps in which each candidate has one loss; return the candidates of the next step."""
    for step in steps:
        parts = {f"{p.view}/{KL}": torch.tensor(losses[p.view]) for p in halving.passes(step)}
        halving.after_update(SimpleNamespace(step=step, parts=parts))
    return views(halving)


def views(halving: Halving) -> list[str]:
    return [one.view for one in halving.passes(0)]


def test_the_worse_half_leaves_after_a_quarter_and_after_half_of_the_steps():
    halving = Halving("teacher", [SIX], KL, 40)
    losses = dict(zip(SIX, (6.0, 1.0, 5.0, 2.0, 4.0, 3.0), strict=True))

    assert learn(halving, range(9), losses) == [*SIX]
    assert learn(halving, range(9, 10), losses) == ["b", "d", "f"]
    assert learn(halving, range(10, 20), losses) == ["b", "d"]
    assert learn(halving, range(20, 40), losses) == ["b", "d"]
    assert [one.scale for one in halving.passes(0)] == [0.5, 0.5]


def test_only_the_second_half_of_a_rung_counts():
    halving = Halving("teacher", [("a", "b", "c")], KL, 40)

    learn(halving, range(5), {"a": 100.0, "b": 1.0, "c": 1.0})
    left = learn(halving, range(5, 10), {"a": 1.0, "b": 2.0, "c": 3.0})

    assert left == ["a", "b"]


def test_each_size_keeps_its_own_candidates():
    halving = Halving("teacher", [("a", "b", "c"), ("d", "e", "f")], KL, 40)

    left = learn(halving, range(40), dict(zip(SIX, (1.0, 2.0, 3.0, 9.0, 8.0, 7.0), strict=True)))

    assert left == ["a", "b", "e", "f"]


def test_a_candidate_without_a_finite_loss_leaves_first():
    halving = Halving("teacher", [("a", "b", "c")], KL, 40)

    assert learn(halving, range(10), {"a": math.nan, "b": 9.0, "c": 8.0}) == ["b", "c"]


@pytest.mark.parametrize(("term", "steps", "names"), [(None, 40, SIX), (KL, 31, SIX)])
def test_all_candidates_stay_in_a_short_trial_or_if_they_are_compared_by_another_metric(
    term, steps, names
):
    halving = Halving("teacher", [names], term, steps)

    assert learn(halving, range(steps), dict.fromkeys(names, 1.0)) == [*names]


def test_a_resumed_trial_goes_on_with_the_same_candidates_and_losses():
    losses = dict(zip(SIX, (6.0, 1.0, 5.0, 2.0, 4.0, 3.0), strict=True))
    whole, first, second = (Halving("teacher", [SIX], KL, 40) for _ in range(3))

    learn(whole, range(17), losses)
    learn(first, range(17), losses)
    second.load_state_dict(first.state_dict())

    reversed_losses = {name: -loss for name, loss in losses.items()}
    assert views(second) == ["b", "d", "f"]
    assert learn(second, range(17, 20), reversed_losses) == learn(
        whole, range(17, 20), reversed_losses
    )
