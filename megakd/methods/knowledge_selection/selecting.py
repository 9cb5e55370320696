"""The strategies of knowledge selection: a selector that learns or is frozen, or random weights."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megakd.contract.batch import LossInputs, first_positions
from megakd.contract.lab import HeldOutProbe
from megakd.contract.stage import Pass, Strategy
from megakd.engine.collectives import agree, all_reduce_
from megakd.methods.knowledge_selection import KnowledgeSelectionConfig
from megakd.methods.knowledge_selection.selector import (
    ActorCritic,
    Selector,
    Transition,
    hardened,
)

SELECTOR = "selector.safetensors"
NOISE = 0.2
"""Standard deviation of the noise that is added to the actions of a phase of stage 1."""


class Selecting(Strategy):
    """A strategy in which a frozen selector chooses the weights of the kinds at every step.

    The state of a step is computed from the last hidden states of both models in the step's first
    micro-batch: the mean over all ranks at the first position of each row (for language models, at
    all positions). Reading the action costs one device sync per step.

    whole_texts: whether a state is the mean over all tokens, not only over each text's first token.
    """

    def __init__(
        self,
        teacher: str,
        selector: Selector,
        config: KnowledgeSelectionConfig,
        probe: HeldOutProbe | None,
        *,
        seed: int,
        whole_texts: bool = False,
    ) -> None:
        self.teacher, self.selector, self.config, self.probe = teacher, selector, config, probe
        self.seed, self.whole_texts, self.is_hard = seed, whole_texts, config.action == "hard"
        self._decided: tuple[int, tuple[float, ...]] | None = None
        self._window: list[tuple[float, ...]] = []

    @property
    def reads_states(self) -> bool:
        return True

    def passes(self, step: int) -> tuple[Pass, ...]:
        """Return one pass; its weights are chosen after the forward of both models."""
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
        """Return [S + T], the mean states of student and teacher, on the CPU."""
        valid = reading.batch.valid
        both = [answer.states(-1) for answer in (reading.student, reading.taught)]
        if self.whole_texts:
            rows, sums = valid, [_sum_of(states.flatten(0, 1), valid.flatten()) for states in both]
        else:
            rows = valid.any(dim=1)
            sums = [_sum_of(first_positions(states, valid), rows) for states in both]
        total = torch.cat([*sums, rows.sum()[None]])
        all_reduce_(total)
        return (total[:-1] / total[-1].clamp(min=1)).cpu()

    @torch.no_grad()
    def _chosen(self, step: int, summaries: Tensor) -> tuple[float, ...]:
        action = self.selector.action(self.selector.state(summaries[None]))[0]
        values = tuple((action + self._noise(step, len(action))).tolist())
        if self.is_hard:
            chosen = hardened(values)
        else:
            chosen = tuple(min(max(value, 0.0), 1.0) for value in values)
        # The last digits differ between kinds of processors, and ranks that use different kinds of
        # knowledge would wait for each other forever.
        return agree(chosen)

    def _noise(self, step: int, kinds: int) -> Tensor:
        del step, kinds
        return torch.zeros(())

    def _note(self, summaries: Tensor, action: tuple[float, ...]) -> None:
        pass

    def scalars(self) -> Mapping[str, float]:
        """Return the mean weight of each kind since the last call."""
        taken, self._window = self._window, []
        if not taken:
            return {}
        means = [sum(values) / len(taken) for values in zip(*taken, strict=True)]
        kinds = self.selector.shape.kinds
        return {f"select/{kind}": mean for kind, mean in zip(kinds, means, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"window": list(self._window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._window = list(state["window"])


@dataclass
class Running:
    """The current phase, and what is known of earlier phases.

    summaries, actions: states and actions of the steps of the current phase.
    loss: loss on held-out rows at the last measurement.
    beginning: loss on held-out rows of the initial student.
    before: mean action of the previous phase.
    counts: number of phases by their usual hard action.
    pending: the last phase, which is learned when the first state after the phase is known.
    logged: rewards of learned phases since the last logging.
    """

    summaries: list[Tensor] = field(default_factory=list)
    actions: list[tuple[float, ...]] = field(default_factory=list)
    loss: float = math.nan
    beginning: float = math.nan
    before: Tensor | None = None
    counts: dict[tuple[float, ...], int] = field(default_factory=dict)
    pending: tuple[Tensor, Tensor, float, float] | None = None
    logged: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return the phase as plain values, which later versions of the code can read."""
        counts = [(list(action), count) for action, count in self.counts.items()]
        return {**vars(self), "counts": counts}

    @staticmethod
    def of(state: Mapping[str, Any]) -> Running:
        counts = {tuple(action): count for action, count in state["counts"]}
        return Running(**{**state, "counts": counts})


class LearningToSelect(Selecting):
    """A strategy that trains the selector over episodes; the student starts again in each.

    steps, phase_steps: optimizer steps of an episode and of a phase.
    """

    def __init__(self, *parts: Any, steps: int, phase_steps: int, **facts: Any) -> None:
        super().__init__(*parts, **facts)
        self.steps, self.phase_steps = steps, phase_steps
        self.learner = ActorCritic(self.selector, self.config, seed=self.seed)
        self.running = Running()
        self._student: Any = None

    @property
    def episodes(self) -> int:
        return self.config.episodes

    def begin(self, student: Any, step: int) -> None:
        """Keep the initial student, to which every episode is reset."""
        self._student = student
        if self.probe is None:
            return
        run, steps = self.running, self.steps
        if step == 0:
            self.probe.remember(student)
            run.loss = run.beginning = self.probe.loss(student)
        elif step <= (self.episodes - 1) * steps:  # at most where the last episode begins
            self.probe.check_remembered()
            if step % steps == 0:
                self.probe.reset(student)
                run.loss = run.beginning

    def _noise(self, step: int, kinds: int) -> Tensor:
        # The steps of a phase share the reward and the noise.
        episode, step = divmod(step, self.steps)
        phase = step // self.phase_steps
        drawn = random.Random(f"{self.seed}:noise:{episode}:{phase}")
        return torch.tensor([drawn.gauss(0, NOISE) for _ in range(kinds)])

    def _note(self, summaries: Tensor, action: tuple[float, ...]) -> None:
        self.running.summaries.append(summaries)
        self.running.actions.append(action)

    def after_update(self, report: Any) -> None:
        """End phases and episodes; learn a phase after the first step of the next phase."""
        run, done = self.running, report.step % self.steps + 1
        if run.pending is not None:
            self._learn(run.summaries[0])
        is_last = done == self.steps
        if is_last or done % self.phase_steps == 0:
            self._end_phase()
        if is_last:
            self._learn(None)
            run.before = None

    def _end_phase(self) -> None:
        if self.probe is None:
            raise TypeError("a selector that learns needs a held-out probe")
        run, beta = self.running, self.config.exploration
        loss, actions = self.probe.loss(self._student), torch.tensor(run.actions)
        before, run.before = run.before, actions.mean(0)
        # The reward is higher if hard actions are rare, or soft ones differ from the last phase.
        exploration = 0.0
        if self.is_hard:
            usual = tuple(run.before.round().tolist())
            run.counts[usual] = run.counts.get(usual, 0) + 1
            exploration = beta / math.sqrt(run.counts[usual])
        elif before is not None:
            exploration = -beta * float(functional.cosine_similarity(run.before, before, dim=0))
        run.pending = (torch.stack(run.summaries), actions, run.loss - loss, exploration)
        run.loss, run.summaries, run.actions = loss, [], []

    def _learn(self, following: Tensor | None) -> None:
        if self.running.pending is None:
            return
        summaries, actions, fall, exploration = self.running.pending
        phase = Transition(summaries, actions, fall, following, exploration)
        self.running.logged.append(self.learner.learn(phase))
        self.running.pending = None

    def scalars(self) -> Mapping[str, float]:
        """Return mean weights, and mean reward and last loss of the phases since the last call."""
        rewards, self.running.logged = self.running.logged, []
        if not rewards:
            return super().scalars()
        reward = sum(rewards) / len(rewards)
        measured = {"select/reward": reward, "select/held_out_loss": self.running.loss}
        return {**super().scalars(), **measured}

    def files(self) -> Mapping[str, bytes]:
        """Return the selector's file, for stage 2 and for other students."""
        return {SELECTOR: self.selector.to_bytes()}

    def state_dict(self) -> dict[str, Any]:
        learner = self.learner.state_dict()
        return {**super().state_dict(), "learner": learner, "running": self.running.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.learner.load_state_dict(state["learner"])
        self.running = Running.of(state["running"])


@dataclass(frozen=True)
class RandomWeights(Strategy):
    """A strategy with random weights at every step, as a function of seed and step.

    The weights of the objective are multiplied by them.

    hard: whether a kind is either used or not, instead of a weight between 0 and 1.
    """

    teacher: str
    kinds: tuple[str, ...]
    hard: bool
    seed: int

    def passes(self, step: int) -> tuple[Pass, ...]:
        drawn = random.Random(f"{self.seed}:kinds:{step}")
        factors = tuple(drawn.random() for _ in self.kinds)
        if self.hard:
            factors = hardened(factors)
        chosen = dict(zip(self.kinds, factors, strict=True))
        return (Pass(teacher=self.teacher, weigh=lambda reading: chosen),)


def _sum_of(states: Tensor, chosen: Tensor) -> Tensor:
    """Return the fp32 sum [D] of the chosen rows of [N, D]; indexing would make the host wait."""
    return states.float().masked_fill(~chosen[:, None], 0).sum(0)
