"""The actor and the critic that choose the weights of the kinds of knowledge in a step.

They learn by deterministic policy gradients over a state that summarises student and teacher (Wang
et al. 2022, https://arxiv.org/abs/2302.00444, section on the knowledge selection module).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from megakd.errors import TeacherError
from megakd.methods.knowledge_selection import KnowledgeSelectionConfig
from megakd.storage.folders import check_given

HIDDEN = 64
"""Width of a selector's layers."""
UPDATES, SAMPLES, MEMORY = 32, 64, 2048
"""Training steps after a phase, the stored steps that each reads, and the most that are stored."""
RESTRAINT = 0.02
"""Strength of the penalty that keeps weights near 0.5: without it, any slope of the critic drives
them to 0 or 1."""


class SelectorShape(NamedTuple):
    """Shape of a selector: widths of both summaries, and the kinds of knowledge."""

    student: int
    teacher: int
    kinds: tuple[str, ...]


def _layers(*widths: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for first, second in pairwise(widths):
        parts += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class Selector(nn.Module):
    """Two-layer networks for both summaries, a three-layer actor and a three-layer critic.

    Shapes: N steps, S and T widths of the summaries, K kinds.
    """

    def __init__(self, shape: SelectorShape) -> None:
        super().__init__()
        self.shape, kinds = shape, len(shape.kinds)
        self.student = _layers(shape.student, HIDDEN, HIDDEN)
        self.teacher = _layers(shape.teacher, HIDDEN, HIDDEN)
        self.actor = _layers(2 * HIDDEN, HIDDEN, HIDDEN, kinds)
        # Initial weights are about 0.5 for all kinds, where the sigmoid is steepest.
        nn.init.uniform_(cast("nn.Linear", self.actor[-1]).weight, -1e-3, 1e-3)
        nn.init.zeros_(cast("nn.Linear", self.actor[-1]).bias)
        self.critic = _layers(2 * HIDDEN + kinds, HIDDEN, HIDDEN, 1)

    def state(self, summaries: Tensor) -> Tensor:
        """Return [N, 2 * HIDDEN] states for [N, S + T] concatenated summaries."""
        student, teacher = summaries.split([self.shape.student, self.shape.teacher], dim=-1)
        return torch.cat([self.student(student), self.teacher(teacher)], dim=-1)

    def action(self, state: Tensor) -> Tensor:
        """Return [N, K] actions between 0 and 1."""
        return self.actor(state).sigmoid()

    def value(self, state: Tensor, action: Tensor) -> Tensor:
        """Return [N] expected returns of actions in states."""
        return self.critic(torch.cat([state, action], dim=-1)).squeeze(-1)

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file with the selector and its shape."""
        return save(self.state_dict(), metadata={"shape": json.dumps(self.shape._asdict())})


def load_selector(path: str) -> Selector:
    """Load a selector that `Selector.to_bytes` wrote."""
    file_name = Path(path).name
    check_given(Path(path).parent, "method.selector", wanted=lambda name: name == file_name)
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["shape"])
            shape = SelectorShape(**{**facts, "kinds": tuple(facts["kinds"])})
            selector = Selector(shape)
            selector.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError as error:
        raise TeacherError(f"method.selector: {path} does not exist") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TeacherError(f"method.selector: {path} is not a saved selector: {error}") from error
    return selector


class Transition(NamedTuple):
    """A phase: summaries and actions of its steps, what it is worth, and the following summary.

    summaries: [N, S + T]. actions: [N, K]. fall: decrease of the held-out loss, in units of the
    loss. following: [S + T], or None at the end of an episode. exploration: reward for new actions.
    """

    summaries: Tensor
    actions: Tensor
    fall: float
    following: Tensor | None
    exploration: float = 0.0


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
    def of(phase: Transition) -> Samples:
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

    def joined(self, others: Samples, most: int) -> Samples:
        """Return these samples followed by other samples, truncated to the last `most` samples."""
        return Samples(*(torch.cat(pair)[-most:] for pair in zip(self, others, strict=True)))

    def scaled(self) -> Samples:
        """Return the samples with falls in units of their root mean square."""
        usual = self.falls.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return self._replace(falls=self.falls / usual)

    @property
    def rewards(self) -> Tensor:
        return self.falls + self.exploration

    def drawn(self, count: int, generator: torch.Generator) -> Samples:
        """Return `count` random samples, drawn with replacement."""
        chosen = torch.randint(len(self.falls), (count,), generator=generator)
        return Samples(*(part[chosen] for part in self))


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
        self._actor = torch.optim.Adam(policy, lr=config.selector_learning_rate)
        critic = selector.critic.parameters()
        self._critic = torch.optim.Adam(critic, lr=config.selector_learning_rate)

    def learn(self, phase: Transition) -> float:
        """Train the critic towards reward + gamma * Q(next), and the actor towards a higher Q.

        All stored falls have one scale, which a stored phase's own time cannot change. The result
        is the reward of the phase on this scale.
        """
        new, known = Samples.of(phase), self._memory
        self._memory = new if known is None else known.joined(new, MEMORY)
        scaled = self._memory.scaled()
        for _ in range(UPDATES):
            self._teach(scaled.drawn(SAMPLES, self._generator))
        return float(scaled.rewards[-1])

    def _teach(self, some: Samples) -> None:
        selector = self.selector
        with torch.no_grad():
            following = selector.state(some.following)
            later = some.goes_on * selector.value(following, selector.action(following))
            target = some.rewards + self.config.gamma * later
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
