"""The strategies of knowledge selection: a selector that learns or is frozen, and random ones."""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megakd.contract.positions import first_positions
from megakd.contract.stage import Pass, Stateless
from megakd.methods.knowledge_selection.selector import (
    ActorCritic,
    Learning,
    Selector,
    Transition,
    alike,
    hardened,
)

if TYPE_CHECKING:
    from megakd.contract.batch import LossInputs
    from megakd.contract.lab import HeldOutProbe

SELECTOR = "selector.safetensors"
WINDOW = 20
"""Phases whose rewards say how large a reward usually is."""


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """How actions are made of what the actor says.

    hard: a kind is used or not. threshold: from which on it is. noise: standard deviation of
        what is added to a phase's actions while learning, to try others.
    whole_texts: a state is the mean over all tokens, not over the first of each text.
    """

    hard: bool
    threshold: float
    noise: float
    seed: int
    whole_texts: bool = False


class Selecting(Stateless):
    """Asks a frozen selector at every step which kinds of knowledge count how much.

    State of a step: the last hidden states of both models at the first position of each row (of
    language models at all positions), the mean over all ranks, in the step's first micro-batch.
    Reading the action costs the step one wait for the device.
    """

    def __init__(
        self, teacher: str, selector: Selector, choosing: Choosing, probe: HeldOutProbe | None
    ) -> None:
        self.teacher, self.selector, self.choosing = teacher, selector, choosing
        self.probe = probe
        self._decided: tuple[int, tuple[float, ...]] | None = None
        self._window: list[tuple[float, ...]] = []

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the stage's result depends on."""
        frozen = hashlib.sha256(self.selector.to_bytes()).hexdigest()
        return {"selector": frozen, **vars(self.choosing)}

    def passes(self, step: int) -> tuple[Pass, ...]:
        """Return one pass, whose weights are chosen when both models have answered."""
        weigh = None if self.probe is None else functools.partial(self.weigh, step)
        return (Pass(teacher=self.teacher, weigh=weigh),)

    def weigh(self, step: int, reading: LossInputs) -> Mapping[str, float]:
        """Return the action of a step, the same for all its micro-batches and on all ranks."""
        if self._decided is None or self._decided[0] != step:
            summaries = self._summaries(reading)
            self._decided = step, self._chosen(step, summaries)
            self._window.append(self._decided[1])
            self._note(summaries, self._decided[1])
        return dict(zip(self.selector.shape.kinds, self._decided[1], strict=True))

    @torch.no_grad()
    def _summaries(self, reading: LossInputs) -> Tensor:
        """[S + T], on the CPU."""
        valid = reading.batch.valid
        both = [said.hidden_states[-1] for said in (reading.student, reading.taught)]
        if self.choosing.whole_texts:
            rows, sums = valid, [states[valid].float().sum(0) for states in both]
        else:
            rows = valid.any(dim=1)
            sums = [first_positions(states, valid)[rows].float().sum(0) for states in both]
        total = torch.cat([*sums, rows.sum()[None]])
        if self.probe is not None:
            self.probe.add_up(total)
        return (total[:-1] / total[-1].clamp(min=1)).cpu()

    @torch.no_grad()
    def _chosen(self, step: int, summaries: Tensor) -> tuple[float, ...]:
        action = self.selector.action(self.selector.state(summaries[None]))[0]
        action = (action + self._noise(step, len(action))).clamp(0, 1)
        values = tuple(action.tolist())
        choosing = self.choosing
        return hardened(values, choosing.threshold) if choosing.hard else values

    def _noise(self, step: int, kinds: int) -> Tensor:
        del step, kinds
        return torch.zeros(())

    def _note(self, summaries: Tensor, action: tuple[float, ...]) -> None:
        """Take note of what was decided in a step."""

    def scalars(self) -> Mapping[str, float]:
        """The mean weight of each kind since the last call."""
        taken, self._window = self._window, []
        if not taken:
            return {}
        means = [sum(values) / len(taken) for values in zip(*taken, strict=True)]
        kinds = self.selector.shape.kinds
        return {f"select/{kind}": mean for kind, mean in zip(kinds, means, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """What has been chosen since the last logging."""
        return {"window": list(self._window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self._window = list(state["window"])


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """How an episode is cut, and what is rewarded beside the loss that goes down.

    steps: of an episode. phase_steps: after so many the reward is measured.
    exploration: beta, what doing something else is worth.
    """

    number: int
    steps: int
    phase_steps: int
    exploration: float


@dataclass
class Running:
    """The phase that is going on, and what is known of the ones before.

    loss: on held-out rows, at the last measurement; beginning: of the student as it was at first.
    rewards: of the last phases, before they are divided by their usual size.
    pending: the last phase, which waits to see what comes after it.
    """

    summaries: list[Tensor] = field(default_factory=list)
    actions: list[tuple[float, ...]] = field(default_factory=list)
    loss: float = math.nan
    beginning: float = math.nan
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    before: Tensor | None = None
    counts: dict[tuple[float, ...], int] = field(default_factory=dict)
    pending: tuple[Tensor, Tensor, float] | None = None
    logged: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return the phase as plain values, which no later layout of the code can orphan."""
        counts = [(list(action), count) for action, count in self.counts.items()]
        return {**vars(self), "rewards": list(self.rewards), "counts": counts}

    @staticmethod
    def of(state: Mapping[str, Any]) -> Running:
        """Return the phase that `state_dict` described."""
        counts = {tuple(action): count for action, count in state["counts"]}
        rewards = deque(state["rewards"], maxlen=WINDOW)
        return Running(**{**state, "rewards": rewards, "counts": counts})


class LearningToSelect(Selecting):
    """Trains the selector over episodes; the student begins each of them anew."""

    def __init__(
        self,
        teacher: str,
        selector: Selector,
        choosing: Choosing,
        probe: HeldOutProbe | None,
        *,
        episodes: Episodes,
        learning: Learning,
    ) -> None:
        super().__init__(teacher, selector, choosing, probe)
        self.episodes, self.learning = episodes, learning
        self.learner = ActorCritic(selector, learning, seed=choosing.seed)
        self.running = Running()
        self._student: Any = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the stage's result depends on."""
        return {**super().facts, **vars(self.episodes), **vars(self.learning)}

    def begin(self, student: Any, step: int) -> None:
        """Keeps the student as it is before the first episode."""
        self._student = student
        if step == 0 and self.probe is not None:
            self.probe.remember(student)
            self.running.loss = self.running.beginning = self.probe.loss(student)

    def _noise(self, step: int, kinds: int) -> Tensor:
        # The steps of a phase share its reward, and what is tried in them.
        episode, step = divmod(step, self.episodes.steps)
        phase = step // self.episodes.phase_steps
        drawn = random.Random(f"{self.choosing.seed}:noise:{episode}:{phase}")
        return torch.tensor([drawn.gauss(0, self.choosing.noise) for _ in range(kinds)])

    def _note(self, summaries: Tensor, action: tuple[float, ...]) -> None:
        self.running.summaries.append(summaries)
        self.running.actions.append(action)

    def after_update(self, report: Any) -> None:
        """Ends phases and episodes; the phase before learns when its successor has begun."""
        run, done = self.running, report.step % self.episodes.steps + 1
        if run.pending is not None:
            self._learn(run.summaries[0])
        is_last = done == self.episodes.steps
        if is_last or done % self.episodes.phase_steps == 0:
            self._end_phase()
        if is_last:
            self._learn(None)
            run.before = None
            if report.step + 1 < self.episodes.number * self.episodes.steps:
                self._measuring.reset(self._student)
                run.loss = run.beginning

    @property
    def _measuring(self) -> HeldOutProbe:
        if self.probe is None:
            raise TypeError("a selector that learns needs something to measure with")
        return self.probe

    def _end_phase(self) -> None:
        run = self.running
        loss = self._measuring.loss(self._student)
        actions = torch.tensor(run.actions)
        reward = self._usual(run.loss - loss) + self._exploration(actions)
        run.pending = (torch.stack(run.summaries), actions, reward)
        run.loss, run.summaries, run.actions = loss, [], []
        run.logged.append(reward)

    def _usual(self, gain: float) -> float:
        """A fall of the loss in units of how much it usually changes."""
        rewards = self.running.rewards
        rewards.append(gain)
        size = math.sqrt(sum(value * value for value in rewards) / len(rewards))
        return gain / size if size > 0 else 0.0

    def _exploration(self, actions: Tensor) -> float:
        """More where the phase did something else than the one before, or than most."""
        run, beta = self.running, self.episodes.exploration
        mean = actions.mean(0)
        before, run.before = run.before, mean
        if not self.choosing.hard:
            return 0.0 if before is None else -beta * alike(mean, before)
        usual = tuple(mean.round().tolist())
        run.counts[usual] = run.counts.get(usual, 0) + 1
        return beta / math.sqrt(run.counts[usual])

    def _learn(self, following: Tensor | None) -> None:
        if self.running.pending is None:
            return
        summaries, actions, reward = self.running.pending
        self.learner.learn(Transition(summaries, actions, reward, following))
        self.running.pending = None

    def scalars(self) -> Mapping[str, float]:
        """Weights, and the mean reward and the last loss of the phases since the last call."""
        rewards, self.running.logged = self.running.logged, []
        if not rewards:
            return super().scalars()
        reward = sum(rewards) / len(rewards)
        measured = {"select/reward": reward, "select/held_out_loss": self.running.loss}
        return {**super().scalars(), **measured}

    def files(self) -> Mapping[str, bytes]:
        """The selector, for stage 2 and for other students."""
        return {SELECTOR: self.selector.to_bytes()}

    def state_dict(self) -> dict[str, Any]:
        """Selector, optimizers, and the phase that is going on."""
        learner = self.learner.state_dict()
        return {**super().state_dict(), "learner": learner, "running": self.running.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        super().load_state_dict(state)
        self.learner.load_state_dict(state["learner"])
        self.running = Running.of(state["running"])


@dataclass(frozen=True)
class RandomWeights(Stateless):
    """Weights that are drawn anew at every step: a function of seed and step."""

    teacher: str
    kinds: tuple[str, ...]
    weights: tuple[float, ...]
    hard: bool
    seed: int

    def passes(self, step: int) -> tuple[Pass, ...]:
        """One pass with the weights of this step."""
        drawn = random.Random(f"{self.seed}:kinds:{step}")
        factors = tuple(drawn.random() for _ in self.kinds)
        if self.hard:
            factors = hardened(factors, 0.5)
        chosen = zip(self.kinds, self.weights, factors, strict=True)
        weights = {kind: weight * factor for kind, weight, factor in chosen}
        return (Pass(teacher=self.teacher, weights=weights),)
