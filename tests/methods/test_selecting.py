"""The strategies of knowledge selection: states, phases, rewards and episodes, step by step."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from megakd.contract.batch import Knowledge
from megakd.methods.knowledge_selection.selecting import (
    Choosing,
    Episodes,
    LearningToSelect,
    RandomWeights,
    Running,
    Selecting,
)
from megakd.methods.knowledge_selection.selector import (
    ActorCritic,
    Learning,
    Selector,
    SelectorShape,
    Transition,
)
from megakd.training.checkpoint import check_plain
from megakd.training.probe import StageProbe

KINDS = ("labels", "responses", "features")
STUDENT, TEACHER = 2, 3


class Measured:
    """Losses that are known before, and what was asked for."""

    def __init__(self, losses: list[float]) -> None:
        self.losses, self.asked, self.remembered, self.resets = losses, 0, 0, 0
        self.checked = 0

    def add_up(self, total: torch.Tensor) -> None:
        """One rank has the sums of all."""

    def agree(self, value: Any) -> Any:
        """One rank agrees with itself."""
        return value

    def check_remembered(self) -> None:
        self.checked += 1

    def loss(self, student: Any) -> float:
        del student
        self.asked += 1
        return self.losses[self.asked - 1]

    def remember(self, student: Any) -> None:
        del student
        self.remembered += 1

    def reset(self, student: Any) -> None:
        del student
        self.resets += 1


class Heard:
    """In place of an actor-critic: what it was to learn from."""

    def __init__(self) -> None:
        self.phases: list[Transition] = []

    def learn(self, phase: Transition) -> None:
        self.phases.append(phase)


def selector() -> Selector:
    torch.manual_seed(0)
    return Selector(SelectorShape(student=STUDENT, teacher=TEACHER, kinds=KINDS, hidden=4))


def choosing(**changes: Any) -> Choosing:
    return Choosing(**{"hard": False, "threshold": 0.5, "noise": 0.0, "seed": 1, **changes})


def said(step: int, valid: torch.Tensor | None = None) -> Any:
    """What both models say at a step of a batch of two texts of three tokens."""
    generator = torch.Generator().manual_seed(step)
    valid = torch.ones(2, 3, dtype=torch.bool) if valid is None else valid
    student, teacher = (
        Knowledge(hidden_states=(torch.randn(2, 3, width, generator=generator),))
        for width in (STUDENT, TEACHER)
    )
    return SimpleNamespace(batch=SimpleNamespace(valid=valid), student=student, taught=teacher)


def learning(
    losses: list[float], *, exploration: float = 0.0, hard: bool = False, **shape: int
) -> tuple[LearningToSelect, Measured, Heard]:
    """A strategy, before its first step, that learns from losses that are known."""
    measured, heard = Measured(losses), Heard()
    strategy = LearningToSelect(
        "teacher",
        selector(),
        choosing(hard=hard),
        cast("StageProbe", measured),
        course=Episodes(**{"number": 1, **shape}, exploration=exploration),
        learning=Learning(),
    )
    strategy.learner = cast("Any", heard)
    return strategy, measured, heard


def blind(strategy: Selecting) -> None:
    """Its actor says the same in every state."""
    nn.init.zeros_(cast("nn.Linear", strategy.selector.actor[-1]).weight)


def taken(strategy: LearningToSelect, steps: int) -> None:
    strategy.begin("a student", 0)
    for step in range(steps):
        take(strategy, step)


def take(strategy: LearningToSelect, step: int) -> None:
    weighed(strategy, step, said(step))
    strategy.after_update(SimpleNamespace(step=step))


def weighed(strategy: Selecting, step: int, reading: Any) -> dict[str, float]:
    """What the pass of a step answers about a micro-batch."""
    (planned,) = strategy.passes(step)
    assert planned.weigh is not None
    return dict(planned.weigh(reading))


def test_a_phase_is_worth_the_fall_of_the_loss_in_units_of_how_much_it_usually_changes():
    strategy, _, heard = learning([5.0, 4.0, 2.0, 2.5], steps=6, phase_steps=2)

    taken(strategy, 6)

    usual = [1.0, math.sqrt((1 + 4) / 2), math.sqrt((1 + 4 + 0.25) / 3)]
    wanted = [gain / size for gain, size in zip([1.0, 2.0, -0.5], usual, strict=True)]
    assert [phase.reward for phase in heard.phases] == pytest.approx(wanted)


def test_a_loss_that_does_not_move_is_worth_nothing():
    strategy, _, heard = learning([5.0, 5.0], steps=2, phase_steps=2)

    taken(strategy, 2)

    assert [phase.reward for phase in heard.phases] == [0.0]


def test_doing_the_same_softly_as_in_the_phase_before_costs_beta():
    strategy, _, heard = learning([5.0] * 4, exploration=0.3, steps=3, phase_steps=1)
    blind(strategy)

    taken(strategy, 3)

    assert [phase.reward for phase in heard.phases] == pytest.approx([0.0, -0.3, -0.3])


def test_a_hard_choice_is_worth_less_the_more_often_it_was_made():
    strategy, _, heard = learning([5.0] * 4, exploration=0.3, hard=True, steps=3, phase_steps=1)
    blind(strategy)

    taken(strategy, 3)

    wanted = [0.3, 0.3 / math.sqrt(2), 0.3 / math.sqrt(3)]
    assert [phase.reward for phase in heard.phases] == pytest.approx(wanted)


def test_the_first_phase_of_an_episode_is_compared_with_none_before():
    strategy, _, heard = learning([5.0] * 5, exploration=0.3, number=2, steps=2, phase_steps=1)
    blind(strategy)

    taken(strategy, 4)

    assert [phase.reward for phase in heard.phases] == pytest.approx([0.0, -0.3, 0.0, -0.3])


def test_phases_hold_their_own_steps_and_what_came_next():
    strategy, _, heard = learning([5.0, 4.0, 3.0, 2.0], steps=5, phase_steps=2)

    taken(strategy, 5)

    assert [len(phase.summaries) for phase in heard.phases] == [2, 2, 1]  # the last is cut short
    first, second, last = heard.phases
    for phase, after in ((first, second), (second, last)):
        assert phase.following is not None
        assert torch.equal(phase.following, after.summaries[0])
    assert last.following is None


def test_every_step_may_be_a_phase_of_its_own():
    strategy, measured, heard = learning([5.0, 4.0, 3.0, 2.0], steps=3, phase_steps=1)

    taken(strategy, 3)

    assert len(heard.phases) == 3
    assert measured.asked == 1 + 3


def test_the_student_begins_every_episode_but_none_after_the_last():
    strategy, measured, heard = learning([5.0, 3.0, 4.0], number=2, steps=2, phase_steps=2)

    taken(strategy, 4)

    assert (measured.remembered, measured.resets) == (1, 1)
    # The second falls from 5 again, which is not measured twice.
    assert measured.asked == 3
    first, second = (phase.reward for phase in heard.phases)
    assert (first, second) == pytest.approx((1.0, 1.0 / math.sqrt((4 + 1) / 2)))


def test_a_run_that_goes_on_in_the_middle_of_a_phase_learns_the_same():
    losses = [5.0, 4.0, 2.0, 1.0]
    shape: dict[str, Any] = {"steps": 6, "phase_steps": 2}
    whole, _, wanted = learning(losses, **shape)
    taken(whole, 6)
    killed, measured, found = learning(losses, **shape)
    taken(killed, 3)
    going_on, _, _ = learning(losses[measured.asked :], **shape)
    going_on.running = Running.of(killed.running.state_dict())
    going_on.learner = cast("Any", found)
    going_on.begin("a student", 3)

    for step in range(3, 6):
        take(going_on, step)

    assert [p.reward for p in found.phases] == [p.reward for p in wanted.phases]


def test_what_is_tried_stays_the_same_within_a_phase_and_is_drawn_from_the_seed():
    def tried(seed: int) -> list[list[float]]:
        strategy, _, heard = learning([5.0] * 3, steps=6, phase_steps=3)
        strategy.choosing = choosing(noise=0.1, seed=seed)
        blind(strategy)
        taken(strategy, 6)
        return [action for phase in heard.phases for action in phase.actions.tolist()]

    first = tried(1)

    assert first[0] == first[1] == first[2] != first[3]
    assert first[3] == first[4] == first[5]
    assert first == tried(1) != tried(2)


def test_a_step_has_one_action_for_all_its_micro_batches():
    strategy = Selecting("teacher", selector(), choosing(), cast("StageProbe", Measured([])))

    first, second = weighed(strategy, 0, said(0)), weighed(strategy, 0, said(1))

    assert first == second != weighed(strategy, 1, said(1))


def test_asking_about_the_next_step_in_the_middle_of_a_step_changes_nothing():
    def taken_with(*, ahead: bool) -> tuple[dict[str, float], dict[str, float]]:
        strategy = Selecting("teacher", selector(), choosing(), cast("StageProbe", Measured([])))
        (now,) = strategy.passes(0)
        assert now.weigh is not None
        first = dict(now.weigh(said(0)))
        if ahead:
            strategy.passes(1)
        return first, dict(now.weigh(said(1)))

    first, second = taken_with(ahead=True)

    assert (first, second) == taken_with(ahead=False)
    assert first == second


def test_a_frozen_selector_stays_as_it_is():
    frozen = selector()
    before = frozen.to_bytes()
    strategy = Selecting("teacher", frozen, choosing(), cast("StageProbe", Measured([])))

    for step in range(5):
        weighed(strategy, step, said(step))
        strategy.after_update(cast("Any", SimpleNamespace(step=step)))

    assert frozen.to_bytes() == before


class FirstRankSays(Measured):
    """On a rank whose processor computes other actions than that of the first rank."""

    def agree(self, value: Any) -> Any:
        del value
        return (0.0, 1.0, 1.0)


@pytest.mark.parametrize("hard", [False, True])
def test_the_action_of_the_first_rank_is_taken_whatever_this_rank_computes(hard):
    probe = cast("StageProbe", FirstRankSays([]))
    strategy = Selecting("teacher", selector(), choosing(hard=hard), probe)

    assert weighed(strategy, 0, said(0)) == dict(zip(KINDS, (0.0, 1.0, 1.0), strict=True))


class Noisy(Selecting):
    """Adds known numbers to what the actor says."""

    noise = (-3.0, -1.0, -2.0)

    def _noise(self, step: int, kinds: int) -> torch.Tensor:
        del step, kinds
        return torch.tensor(self.noise)


def test_a_hard_action_far_below_the_threshold_still_uses_the_kind_with_the_largest_value():
    probe = cast("StageProbe", Measured([]))
    strategy = Noisy("teacher", selector(), choosing(hard=True), probe)

    assert list(weighed(strategy, 0, said(0)).values()) == [0.0, 1.0, 0.0]


def test_a_soft_action_may_use_no_kind_and_stays_between_0_and_1():
    probe = cast("StageProbe", Measured([]))
    strategy = Noisy("teacher", selector(), choosing(), probe)
    none = list(weighed(strategy, 0, said(0)).values())
    strategy.noise = (3.0, -3.0, 0.0)
    some = list(weighed(strategy, 1, said(1)).values())

    assert none == [0.0, 0.0, 0.0]
    assert some[:2] == [1.0, 0.0]
    assert 0 < some[2] < 1


@pytest.mark.parametrize(("step", "checks"), [(0, 0), (1, 1), (3, 1), (4, 0), (5, 0)])
def test_a_run_that_goes_on_needs_its_initial_student_if_an_episode_is_still_to_begin(step, checks):
    strategy, measured, _ = learning([5.0], number=3, steps=2, phase_steps=2)

    strategy.begin("a student", step)

    assert measured.checked == checks


@pytest.mark.parametrize(("threshold", "used"), [(0.0, 3), (1.0, 1)])
def test_random_hard_weights_use_the_kinds_that_reach_the_threshold(threshold, used):
    strategy = RandomWeights(
        "teacher", KINDS, (2.0, 2.0, 2.0), hard=True, seed=1, threshold=threshold
    )

    for step in range(20):
        (planned,) = strategy.passes(step)
        assert planned.weights is not None
        assert sorted(planned.weights.values()) == [0.0] * (3 - used) + [2.0] * used


@pytest.mark.parametrize("whole_texts", [False, True])
def test_a_state_is_the_mean_over_first_tokens_or_over_all_without_padding(whole_texts):
    valid = torch.tensor([[True, True, False], [False, False, False]])
    reading = said(0, valid)
    how = choosing(whole_texts=whole_texts)
    strategy = Selecting("teacher", selector(), how, cast("StageProbe", Measured([])))

    found = strategy._summaries(reading)

    states = torch.cat([reading.student.states(-1), reading.taught.states(-1)], -1)
    wanted = states[0, :2].mean(0) if whole_texts else states[0, 0]
    assert torch.allclose(found, wanted)


@pytest.mark.parametrize("hard", [False, True])
def test_the_state_of_a_learning_selector_is_plain_values_and_gives_the_same_one_back(hard):
    losses = [5.0, 4.0, 2.0, 1.0]
    shape: dict[str, Any] = {"steps": 6, "phase_steps": 2, "exploration": 0.3, "hard": hard}
    strategy, _, _ = learning(losses, **shape)
    strategy.learner = ActorCritic(strategy.selector, Learning(updates=2))
    taken(strategy, 5)
    other, _, _ = learning(losses, **shape)
    other.learner = ActorCritic(other.selector, Learning(updates=2))

    state = strategy.state_dict()
    check_plain(state)
    other.load_state_dict(state)

    assert other.running.counts == strategy.running.counts
    assert other.running.rewards == strategy.running.rewards
    assert other.running.rewards.maxlen == strategy.running.rewards.maxlen
    known, wanted = other.learner._memory, strategy.learner._memory
    assert known is not None
    assert wanted is not None
    assert all(torch.equal(a, b) for a, b in zip(known, wanted, strict=True))
