"""The selector of knowledge, an actor and a critic, and the strategies that use it.

Actor and critic choose the weights of the kinds of knowledge in a step. They learn by deterministic
policy gradients over a state that summarises student and teacher (Wang et al. 2022,
https://arxiv.org/abs/2302.00444, section on the knowledge selection module).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from megakd.data.batch import LossInputs, Pass, first_positions
from megakd.engine.collectives import all_reduce_, broadcast
from megakd.methods.knowledge_selection import KnowledgeSelectionConfig
from megakd.stage import StepReport, Strategy
from megakd.training.evaluation import StageProbe

SELECTOR = "selector.safetensors"
NOISE = 0.2
"""Standard deviation of the noise that is added to the actions of a phase of stage 1."""
LEARNING_RATE = 1e-3
"""Of actor and critic (Adam)."""
GAMMA = 0.9
"""Discount factor of later rewards."""
HIDDEN = 64
"""Width of a selector's layers."""
UPDATES, SAMPLES, MEMORY = 32, 64, 2048
"""Training steps after a phase, the stored steps that each reads, and the most that are stored."""
RESTRAINT = 0.02
"""Strength of the penalty that keeps weights near 0.5: without it, any slope of the critic drives
them to 0 or 1."""


def _layers(*widths: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for first, second in pairwise(widths):
        parts += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class Selector(nn.Module):
    """Two-layer networks for both summaries, a three-layer actor and a three-layer critic.

    Shapes: N steps, S and T widths of the summaries, K kinds.

    widths: widths of the summaries of student and teacher.
    kinds: names of the kinds of knowledge.
    """

    def __init__(self, widths: tuple[int, int], kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.widths, self.kinds = widths, kinds
        self.student, self.teacher = (_layers(width, HIDDEN, HIDDEN) for width in widths)
        self.actor = _layers(2 * HIDDEN, HIDDEN, HIDDEN, len(kinds))
        # Initial weights are about 0.5 for all kinds, where the sigmoid is steepest.
        nn.init.uniform_(cast("nn.Linear", self.actor[-1]).weight, -1e-3, 1e-3)
        nn.init.zeros_(cast("nn.Linear", self.actor[-1]).bias)
        self.critic = _layers(2 * HIDDEN + len(kinds), HIDDEN, HIDDEN, 1)

    def state(self, summaries: Tensor) -> Tensor:
        """Return [N, 2 * HIDDEN] states for [N, S + T] concatenated summaries."""
        student, teacher = summaries.split(self.widths, dim=-1)
        return torch.cat([self.student(student), self.teacher(teacher)], dim=-1)

    def action(self, state: Tensor) -> Tensor:
        """Return [N, K] actions between 0 and 1."""
        return self.actor(state).sigmoid()

    def value(self, state: Tensor, action: Tensor) -> Tensor:
        """Return [N] expected returns of actions in states."""
        return self.critic(torch.cat([state, action], dim=-1)).squeeze(-1)


class Transition(NamedTuple):
    """A phase: summaries and actions of its steps, what it is worth, and the following summary.

    summaries: [N, S + T]. actions: [N, K]. fall: decrease of the held-out loss, in units of the
    loss. exploration: reward for new actions. following: [S + T], or None at the end of an episode.
    """

    summaries: Tensor
    actions: Tensor
    fall: float
    exploration: float = 0.0
    following: Tensor | None = None


class Samples(NamedTuple):
    """Steps of many phases.

    summaries: [N, S + T]. actions: [N, K]. falls, exploration: [N], those of each step's phase.
    following: [N, S + T]. goes_on: [N], 0 if the episode ended with the phase, else 1.
    """

    summaries: Tensor
    actions: Tensor
    falls: Tensor
    exploration: Tensor
    following: Tensor
    goes_on: Tensor

    @staticmethod
    def from_phase(phase: Transition) -> Samples:
        """Return the steps of a phase, which share its worth and the following summary."""
        steps, following = len(phase.summaries), phase.following
        then = phase.summaries[-1] if following is None else following
        return Samples(
            phase.summaries,
            phase.actions,
            torch.full((steps,), phase.fall),
            torch.full((steps,), phase.exploration),
            then.expand(steps, -1),
            torch.full((steps,), float(following is not None)),
        )

    @property
    def rewards(self) -> Tensor:
        """The falls [N] in units of their root mean square, and what exploration adds."""
        usual = self.falls.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return self.falls / usual + self.exploration


class ActorCritic:
    """The training of a selector, phase by phase; equal inputs give equal selectors on all ranks.

    Steps of earlier phases are stored and learned again. With only the last phase, the critic would
    attribute the reward to all actions of this phase.
    """

    def __init__(
        self, selector: Selector, config: KnowledgeSelectionConfig, *, seed: int = 0
    ) -> None:
        self.selector, self.config = selector, config
        self._memory: Samples | None = None
        self._generator = torch.Generator().manual_seed(seed)
        policy = [*selector.student.parameters(), *selector.teacher.parameters()]
        policy += selector.actor.parameters()
        self._actor = torch.optim.Adam(policy, lr=LEARNING_RATE)
        critic = selector.critic.parameters()
        self._critic = torch.optim.Adam(critic, lr=LEARNING_RATE)

    def learn(self, phase: Transition) -> float:
        """Train the critic towards reward + GAMMA * Q(next), and the actor towards a higher Q.

        All stored falls have one scale, which a stored phase's own time cannot change. The result
        is the reward of the phase on this scale.
        """
        known = Samples.from_phase(phase)
        if self._memory is not None:
            pairs = zip(self._memory, known, strict=True)
            known = Samples(*(torch.cat(pair)[-MEMORY:] for pair in pairs))
        self._memory, rewards = known, known.rewards
        for _ in range(UPDATES):
            drawn = torch.randint(len(rewards), (SAMPLES,), generator=self._generator)
            self._teach(Samples(*(part[drawn] for part in known)), rewards[drawn])
        return float(rewards[-1])

    def _teach(self, some: Samples, rewards: Tensor) -> None:
        selector = self.selector
        with torch.no_grad():
            following = selector.state(some.following)
            later = some.goes_on * selector.value(following, selector.action(following))
            target = rewards + GAMMA * later
        state = selector.state(some.summaries)
        # Detached; otherwise the summary networks would learn states that the critic prefers.
        seen = state.detach()
        error = selector.value(seen, some.actions) - target
        self._critic.zero_grad()
        error.square().mean().backward()
        self._critic.step()
        logits = selector.actor(state)
        held_back = RESTRAINT * logits.square().sum(-1)
        value = selector.value(seen, logits.sigmoid())
        self._actor.zero_grad()
        (held_back - value).mean().backward()
        self._actor.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "selector": self.selector.state_dict(),
            "actor": self._actor.state_dict(),
            "critic": self._critic.state_dict(),
            "memory": None if self._memory is None else tuple(self._memory),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.selector.load_state_dict(state["selector"])
        self._actor.load_state_dict(state["actor"])
        self._critic.load_state_dict(state["critic"])
        memory = state["memory"]
        self._memory = None if memory is None else Samples(*memory)
        self._generator.set_state(state["generator"])


def hardened(action: Sequence[float]) -> tuple[float, ...]:
    """Return 1 for kinds of at least 0.5, else 0; if no kind reaches it, 1 for the largest."""
    used = [value >= 0.5 for value in action]
    if not any(used):
        used[list(action).index(max(action))] = True
    return tuple(map(float, used))


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
        *,
        seed: int,
        whole_texts: bool = False,
    ) -> None:
        self.teacher, self.selector, self.config = teacher, selector, config
        self.seed, self.whole_texts, self.is_hard = seed, whole_texts, config.action == "hard"
        self._decided: tuple[int, tuple[float, ...]] | None = None

    def passes(self, step: int) -> tuple[Pass, ...]:
        """Return one pass; its weights are chosen after the forward of both models."""
        return (Pass(teacher=self.teacher, weigh=functools.partial(self.weigh, step)),)

    def weigh(self, step: int, inputs: LossInputs) -> Mapping[str, float]:
        """Return the action of a step, the same for all its micro-batches and on all ranks."""
        if self._decided is None or self._decided[0] != step:
            self._decided = step, self._chosen(step, self._summaries(inputs))
        return dict(zip(self.selector.kinds, self._decided[1], strict=True))

    @torch.no_grad()
    def _summaries(self, inputs: LossInputs) -> Tensor:
        """Return [S + T], the mean states of student and teacher, on the CPU."""
        valid = inputs.batch.valid
        both = [answer.states(-1) for answer in (inputs.student, inputs.taught)]
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
        return broadcast(chosen)

    def _noise(self, step: int, kinds: int) -> Tensor:
        del step, kinds
        return torch.zeros(())

    def after_update(self, report: StepReport) -> dict[str, float]:
        """Return the weight of each kind."""
        _, action = self._decided or (0, ())
        names = (f"select/{kind}" for kind in self.selector.kinds)
        return dict(zip(names, action, strict=True))


@dataclass
class Running:
    """The current phase, and what is known of earlier phases.

    summaries, actions: states and actions of the steps of the current phase.
    loss: loss on held-out rows at the last measurement.
    beginning: loss on held-out rows of the initial student.
    before: mean action of the previous phase.
    counts: number of phases by their usual hard action.
    pending: the last phase, which is learned when the first state after the phase is known.
    """

    summaries: list[Tensor] = field(default_factory=list)
    actions: list[tuple[float, ...]] = field(default_factory=list)
    loss: float = math.nan
    beginning: float = math.nan
    before: Tensor | None = None
    counts: dict[tuple[float, ...], int] = field(default_factory=dict)
    pending: Transition | None = None


class LearningToSelect(Selecting):
    """A strategy that trains the selector over episodes; the student starts again in each.

    probe: measures and resets the student; None in a plan, which takes no steps.
    steps, phase_steps: optimizer steps of an episode and of a phase.
    """

    def __init__(
        self, *parts: Any, probe: StageProbe, steps: int, phase_steps: int, **facts: Any
    ) -> None:
        super().__init__(*parts, **facts)
        self.probe, self.steps, self.phase_steps = probe, steps, phase_steps
        self.learner = ActorCritic(self.selector, self.config, seed=self.seed)
        self.running = Running()
        self._student: Any = None

    def begin(self, student: Any, step: int) -> None:
        """Keep the initial student, to which every episode is reset."""
        self._student = student
        run, steps = self.running, self.steps
        if step == 0:
            self.probe.remember(student)
            run.loss = run.beginning = self.probe.loss(student)
        elif step <= (self.config.episodes - 1) * steps:  # at most where the last episode begins
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

    def _chosen(self, step: int, summaries: Tensor) -> tuple[float, ...]:
        self.running.summaries.append(summaries)
        self.running.actions.append(super()._chosen(step, summaries))
        return self.running.actions[-1]

    def after_update(self, report: StepReport) -> dict[str, float]:
        """End phases and episodes; learn a phase after the first step of the next phase.

        Returns the weights of the step, and the reward of a learned phase with the last loss.
        """
        run, done, rewards = self.running, report.step % self.steps + 1, list[float]()
        if run.pending is not None:
            rewards.append(self.learner.learn(run.pending._replace(following=run.summaries[0])))
            run.pending = None
        is_last = done == self.steps
        if is_last or done % self.phase_steps == 0:
            run.pending = self._end_phase()
        if is_last and run.pending is not None:
            rewards.append(self.learner.learn(run.pending))
            run.pending = run.before = None
        scalars = super().after_update(report)
        if rewards:
            scalars["select/reward"] = sum(rewards) / len(rewards)
            scalars["select/held_out_loss"] = run.loss
        return scalars

    def _end_phase(self) -> Transition:
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
        phase = Transition(torch.stack(run.summaries), actions, run.loss - loss, exploration)
        run.loss, run.summaries, run.actions = loss, [], []
        return phase

    def files(self) -> Mapping[str, bytes]:
        """Return the selector's file, for stage 2."""
        return {SELECTOR: save(self.selector.state_dict())}

    def state_dict(self) -> dict[str, Any]:
        run = self.running
        running = {**vars(run), "pending": run.pending and tuple(run.pending)}  # without classes
        return {"learner": self.learner.state_dict(), "running": running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        run, pending = state["running"], state["running"]["pending"]
        self.running = Running(**{**run, "pending": pending and Transition(*pending)})


@dataclass(frozen=True)
class RandomWeights(Strategy):
    """A strategy with random weights at every step, as a function of seed and step.

    kinds: the weights of the objective by term, which are multiplied by the random ones.
    hard: whether a kind is either used or not, instead of a weight between 0 and 1.
    """

    teacher: str
    kinds: Mapping[str, float]
    hard: bool
    seed: int

    def passes(self, step: int) -> tuple[Pass, ...]:
        drawn = random.Random(f"{self.seed}:kinds:{step}")
        factors = tuple(drawn.random() for _ in self.kinds)
        if self.hard:
            factors = hardened(factors)
        kinds = zip(self.kinds.items(), factors, strict=True)
        weights = {kind: weight * factor for (kind, weight), factor in kinds}
        return (Pass(teacher=self.teacher, weights=weights),)


def _sum_of(states: Tensor, chosen: Tensor) -> Tensor:
    """Return the fp32 sum [D] of the chosen rows of [N, D]; indexing would make the host wait."""
    return states.float().masked_fill(~chosen[:, None], 0).sum(0)
