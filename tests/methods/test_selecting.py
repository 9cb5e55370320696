"""The strategies of knowledge selection: states, phases, rewards and episodes, step by step."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from megakd.data.batch import Outputs
from megakd.methods.knowledge_selection import KnowledgeSelectionConfig
from megakd.methods.knowledge_selection import selecting as choosing_module
from megakd.methods.knowledge_selection.selecting import (
    LearningToSelect,
    RandomWeights,
    Selecting,
    Selector,
    Transition,
)
from megakd.stage import Strategy

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(autouse=True)
def no_noise(monkeypatch):
    monkeypatch.setattr(choosing_module, "NOISE", 0.0)


KINDS = ("labels", "responses", "features")
STUDENT, TEACHER = 2, 3


def measured(losses: list[float]) -> Any:
    """A probe whose losses are known before, and which keeps and changes nothing."""
    known = iter(losses)
    idle = dict.fromkeys(("check_remembered", "remember", "reset"), lambda *_: None)
    return SimpleNamespace(loss=lambda _: next(known), **idle)


def selector() -> Selector:
    torch.manual_seed(0)
    return Selector((STUDENT, TEACHER), KINDS)


def choosing(*, hard: bool = False, **options: Any) -> KnowledgeSelectionConfig:
    options = {"name": "knowledge_selection", "episodes": 1, **options}
    return KnowledgeSelectionConfig(action="hard" if hard else "soft", **options)


def reading_at(step: int, valid: torch.Tensor | None = None) -> Any:
    """Return the outputs of both models for a batch of two texts of three tokens."""
    generator = torch.Generator().manual_seed(step)
    valid = torch.ones(2, 3, dtype=torch.bool) if valid is None else valid
    student, teacher = (
        Outputs(hidden_states=(torch.randn(2, 3, width, generator=generator),))
        for width in (STUDENT, TEACHER)
    )
    return SimpleNamespace(batch=SimpleNamespace(valid=valid), student=student, taught=teacher)


def learning(
    losses: list[float], *, steps: int, phase_steps: int, seed: int = 1, **options: Any
) -> tuple[LearningToSelect, list[Transition]]:
    """A strategy, before its first step, that learns from losses that are known; its phases."""
    phases: list[Transition] = []
    strategy = LearningToSelect(
        "teacher",
        selector(),
        choosing(**{"exploration": 0.0, **options}),
        probe=measured(losses),
        seed=seed,
        steps=steps,
        phase_steps=phase_steps,
    )
    strategy.learner = cast("Any", SimpleNamespace(learn=lambda p: phases.append(p) or 0.0))
    return strategy, phases


def selecting(**how: Any) -> Any:
    return Selecting("teacher", selector(), choosing(), seed=1, **how)


def blind(strategy: Selecting) -> None:
    """Its actor says the same in every state."""
    nn.init.zeros_(cast("nn.Linear", strategy.selector.actor[-1]).weight)


def taken(strategy: LearningToSelect, steps: int) -> None:
    for step in range(steps):
        if step % strategy.steps == 0:
            strategy.begin("a student", step)
        weighed(strategy, step, reading_at(step))
        strategy.after_update(cast("Any", SimpleNamespace(step=step)))


def weighed(strategy: Strategy, step: int, reading: Any) -> dict[str, float]:
    """Return the losses of a step's pass for a micro-batch."""
    (planned,) = strategy.passes(step)
    return dict(planned.weigh(reading))


@pytest.mark.parametrize(
    ("losses", "shape", "worth"),
    [
        ([5.0, 4.0, 2.0, 2.5], {"steps": 6, "phase_steps": 2}, [1.0, 2.0, -0.5]),
        ([5.0, 5.0], {"steps": 2, "phase_steps": 2}, [0.0]),
        # The same weights as in the phase before cost beta; an episode begins with no such phase.
        ([5.0] * 4, {"exploration": 0.3, "steps": 3, "phase_steps": 1}, [0.0, -0.3, -0.3]),
        (
            [5.0] * 5,
            {"exploration": 0.3, "episodes": 2, "steps": 2, "phase_steps": 1},
            [0.0, -0.3, 0.0, -0.3],
        ),
        # A hard choice is worth less the more often it was made.
        (
            [5.0] * 4,
            {"exploration": 0.3, "hard": True, "steps": 3, "phase_steps": 1},
            [0.3, 0.3 / math.sqrt(2), 0.3 / math.sqrt(3)],
        ),
    ],
    ids=["falls", "still", "soft", "episodes", "hard"],
)
def test_a_phase_is_worth_the_fall_of_the_loss_and_what_is_new_about_it(losses, shape, worth):
    strategy, phases = learning(losses, **shape)
    if "exploration" in shape:
        blind(strategy)

    taken(strategy, shape.get("episodes", 1) * shape["steps"])

    assert [phase.fall + phase.exploration for phase in phases] == pytest.approx(worth)


def test_what_is_tried_stays_the_same_within_a_phase_and_is_drawn_from_the_seed(monkeypatch):
    monkeypatch.setattr(choosing_module, "NOISE", 0.1)

    def tried(seed: int) -> list[list[float]]:
        strategy, phases = learning([5.0] * 3, steps=6, phase_steps=3, seed=seed)
        blind(strategy)
        taken(strategy, 6)
        return [action for phase in phases for action in phase.actions.tolist()]

    first = tried(1)

    assert first[0] == first[1] == first[2] != first[3]
    assert first[3] == first[4] == first[5]
    assert first == tried(1) != tried(2)


def test_asking_about_the_next_step_in_the_middle_of_a_step_changes_nothing():
    def taken_with(*, ahead: bool) -> list[dict[str, float]]:
        strategy = selecting()
        (now,) = strategy.passes(0)
        first = dict(now.weigh(reading_at(0)))
        if ahead:
            strategy.passes(1)
        return [first, dict(now.weigh(reading_at(1)))]

    first, second = taken_with(ahead=True)

    assert [first, second] == taken_with(ahead=False)
    assert first == second


def test_random_hard_weights_are_0_or_whole_and_use_a_kind_at_every_step():
    strategy = RandomWeights("teacher", dict.fromkeys(KINDS, 2.0), hard=True, seed=1)

    drawn = [dict(strategy.passes(step)[0].weights or {}) for step in range(20)]

    assert {value for factors in drawn for value in factors.values()} == {0.0, 2.0}
    assert all(any(factors.values()) for factors in drawn)


@pytest.mark.parametrize("whole_texts", [False, True])
def test_a_state_is_the_mean_over_first_tokens_or_over_all_without_padding(whole_texts):
    valid = torch.tensor([[True, True, False], [False, False, False]])
    reading = reading_at(0, valid)

    actual = selecting(whole_texts=whole_texts)._summaries(reading)

    states = torch.cat([reading.student.states(-1), reading.taught.states(-1)], -1)
    wanted = states[0, :2].mean(0) if whole_texts else states[0, 0]
    assert torch.allclose(actual, wanted)
