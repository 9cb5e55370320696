"""The actor and the critic on toys whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megakd.methods.knowledge_selection import KnowledgeSelectionConfig, selecting
from megakd.methods.knowledge_selection.selecting import (
    ActorCritic,
    Selector,
    Transition,
    hardened,
)

KINDS = ("labels", "responses", "features", "relations")
WIDTHS = 6, 8


@pytest.fixture(autouse=True)
def discount(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few phases do not show what many later ones are worth."""
    monkeypatch.setattr(selecting, "GAMMA", 0.5)


def selector(seed: int = 0) -> Selector:
    torch.manual_seed(seed)
    return Selector(WIDTHS, KINDS)


def learning(**options: Any) -> KnowledgeSelectionConfig:
    return KnowledgeSelectionConfig(name="knowledge_selection", **options)


def summaries(steps: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, sum(WIDTHS), generator=generator)


def at(phase: int, steps: int) -> torch.Tensor:
    seen = summaries(steps, phase)
    seen[:, 0] = phase % 10 / 5 - 1
    return seen


def played(reward, phases: int = 80) -> list[float]:
    """Mean weights after so many phases of four steps, each rewarded by its mean action.

    What is seen tells how far an episode of ten phases has come.
    """
    learner = ActorCritic(selector(), learning())
    noise = torch.Generator().manual_seed(1)
    for phase in range(phases):
        seen = at(phase, 4)
        with torch.no_grad():
            actions = learner.selector.action(learner.selector.state(seen))
        actions = (actions + 0.2 * torch.randn(1, len(KINDS), generator=noise)).clamp(0, 1)
        brought = reward(actions.mean(0), phase)
        learner.learn(Transition(seen, actions, brought, following=at(phase + 1, 1)[0]))
    with torch.no_grad():
        weights = learner.selector.action(learner.selector.state(summaries(64, 999))).mean(0)
    return weights.tolist()


@pytest.mark.slow
def test_a_kind_that_harms_gets_the_lowest_weight():
    weights = played(lambda action, _: float(action[0] + action[1] + action[2] - action[3]))

    assert weights[3] < min(weights[:3]) - 0.1


@pytest.mark.parametrize(
    "place", [*(pytest.param(n, marks=pytest.mark.slow) for n in range(3)), 3], ids=KINDS
)
def test_what_a_state_is_worth_does_not_hide_which_kind_helps(place):
    """Early phases bring more whatever is done, as a loss falls fastest at first."""
    answer = played(lambda action, phase: 1.0 / (1 + phase % 10) + float(action[place]))

    others = [weight for index, weight in enumerate(answer) if index != place]
    assert answer[place] > max(others) + 0.1


@pytest.mark.parametrize(
    ("fall", "goes_on", "worth"),
    [(0.3, True, 1 / (1 - 0.5)), (-0.7, False, -1.0)],
)
def test_the_critic_expects_what_rewards_add_up_to_until_the_episode_ends(fall, goes_on, worth):
    learner = ActorCritic(selector(), learning())
    seen, actions = summaries(8), torch.full((8, len(KINDS)), 0.5)

    for _ in range(15):
        learner.learn(Transition(seen, actions, fall, following=seen[0] if goes_on else None))

    with torch.no_grad():
        value = learner.selector.value(learner.selector.state(seen), actions).mean()
    assert float(value) == pytest.approx(worth, rel=0.15 if goes_on else 0.07)


@pytest.mark.parametrize(
    ("falls", "rewards"),
    [
        ([3.0, 0.0, 0.0, 1.0], [1.0, 0.1, 0.1, 1.0 / math.sqrt(10 / 4) + 0.1]),
        ([0.0, 0.0], [0.0, 0.1]),
    ],
    ids=["falls", "still"],
)
def test_all_stored_falls_are_divided_by_their_root_mean_square_and_bonuses_are_not(falls, rewards):
    learner, seen = ActorCritic(selector(), learning()), summaries(2)
    actions = torch.full((2, len(KINDS)), 0.5)

    result = [
        learner.learn(Transition(seen, actions, fall, 0.1 if phase else 0.0))
        for phase, fall in enumerate(falls)
    ]

    assert result == pytest.approx(rewards)
    # A phase that is learned later changes the scale of the phases before it.
    scaled = learner._memory.rewards[::2].tolist()
    usual = math.sqrt(sum(fall**2 for fall in falls) / len(falls)) or 1.0
    expected = [fall / usual + (0.1 if phase else 0.0) for phase, fall in enumerate(falls)]
    assert scaled == pytest.approx(expected)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6))
def test_a_hard_action_uses_what_reaches_a_half_and_never_nothing(action):
    result = hardened(action)

    assert set(result) <= {0.0, 1.0}
    assert any(result)
    if max(action) >= 0.5:
        assert result == tuple(float(value >= 0.5) for value in action)
    else:
        assert [i for i, used in enumerate(result) if used] == [action.index(max(action))]
