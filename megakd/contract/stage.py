"""What the rooms say to each other: values that cross a seam, and the protocols behind it.

Shapes: B rows of a micro-batch, T positions, V vocabulary or classes, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from megakd.contract.batch import Batch, Counts, Knowledge
    from megakd.contract.units import UnitOrder, View


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Who teaches, who learns, as which sub-network, and which terms count, in one pass of a step.

    teacher: name of a frozen teacher, or of a model that learns in the same stage, whose answers
        then carry a gradient.
    learner: role of the model that learns; None for the first learner of the stage.
    view: sub-network of the first learner.
    weights: term name -> weight in place of the objective's own; None keeps them. A term of
        weight 0 here is left out: it is neither computed nor reported.
    weigh: the same, asked in the student's forward about what both models said of a micro-batch
        (a `LossInputs`); on all ranks alike. What it gives multiplies the weights.
    """

    teacher: str | None = None
    learner: str | None = None
    view: str | None = None
    weights: Mapping[str, float] | None = None
    scale: float = 1.0
    weigh: Callable[[Any], Mapping[str, float]] | None = None


def backward_groups(plan: Sequence[Pass], size: int | None) -> list[Sequence[Pass]]:
    """The passes that share a backward; `size` in each, None for all in one.

    One backward reduces all gradients, so there should be as few as memory allows.
    """
    size = size or len(plan)
    return [plan[first : first + size] for first in range(0, len(plan), size)]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimiser step, as device tensors: reading them costs a sync, so read seldom."""

    step: int
    parts: Mapping[str, Tensor]
    gradient_norm: Tensor | None
    counts: Counts


class Teacher(Protocol):
    """A frozen model that answers one micro-batch; a collective under ZeRO-3."""

    def __call__(self, batch: Batch) -> Knowledge:
        """What the student's losses need of this micro-batch, detached."""
        ...

    def prefetch(self) -> None:
        """Make ready for the next step, which asks this teacher."""
        ...

    def evict(self) -> None:
        """Make room: the next step asks other teachers."""
        ...


class Strategy(Protocol):
    """The places where a method steers the loop; control flow may not differ by rank.

    A strategy says what its decisions depend on, for a stage's result is reused while that is the
    same: it is a dataclass of plain values, or has a property `facts` that returns a mapping of
    them. A strategy that does neither is refused.
    """

    def begin(self, student: Any, step: int) -> None:
        """A start of the stage, fresh or resumed, is about to take this step."""
        ...

    def passes(self, step: int) -> tuple[Pass, ...]:
        """Return the passes of a step: a function of (config, seed, step) without side effects.

        The loop may ask about any step, any number of times: while a step is taken it asks about
        the next one too if a teacher of the stage is idle.
        """
        ...

    def before_update(self, step: int, student: Any) -> None:
        """Gradients are complete and not yet applied."""
        ...

    def after_update(self, report: StepReport) -> None:
        """The step is taken."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        ...

    def scalars(self) -> Mapping[str, float]:
        """What it has to log of the steps since the last call, the same on every rank."""
        ...

    def files(self) -> Mapping[str, bytes]:
        """What it leaves in the finished stage's folder, by name, beside the model."""
        ...


@dataclass(frozen=True)
class Stateless:
    """A strategy that only plans: it keeps nothing and has no part in an update."""

    def begin(self, student: Any, step: int) -> None:
        """Nothing to do."""

    def passes(self, step: int) -> tuple[Pass, ...]:
        """The passes of this step."""
        raise TypeError(f"{type(self).__name__} plans nothing at step {step}")

    def before_update(self, step: int, student: Any) -> None:
        """Nothing to do."""

    def after_update(self, report: StepReport) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take."""

    def scalars(self) -> Mapping[str, float]:
        """Nothing to log."""
        return {}

    def files(self) -> Mapping[str, bytes]:
        """Nothing to leave."""
        return {}


@dataclass(frozen=True)
class Constant(Stateless):
    """The strategy that plans the same passes at every step."""

    planned: tuple[Pass, ...] = (Pass(),)

    def passes(self, step: int) -> tuple[Pass, ...]:
        """The same passes, whatever the step."""
        del step
        return self.planned


Scores = Mapping[str, Mapping[str, float]]
"""Metrics by the name of a view, all of one evaluation."""


class Cut(NamedTuple):
    """How a model becomes a smaller one: its units are sorted, then the last ones left out."""

    order: UnitOrder | None
    view: View


class Verdict(NamedTuple):
    """The outcome of an evaluation. Higher scores win; NaN loses.

    view: the one that the stage gives if this evaluation wins.
    own: scores of views whose own best evaluation is kept as well. If the stage gives one of these
        views, it gives the weights of that view's best evaluation.
    cut: how the model of this evaluation is written, for a method that prunes while it trains;
        in place of the units that `view` keeps.
    """

    score: float
    view: str
    own: Mapping[str, float] = MappingProxyType({})
    cut: Cut | None = None


class Judge(Protocol):
    """Says what an evaluation of a stage's views is worth, and which of them it would give."""

    def __call__(self, scores: Scores, step: int) -> Verdict:
        """Return the same verdict on every rank: it decides what is kept.

        Args:
            scores: metrics by view, all of one evaluation.
            step: number of steps that the stage has taken.
        """
        ...


class BatchSource(Protocol):
    """The micro-batches of a stage, an optimizer step at a time.

    steps_per_epoch: steps that `num_train_epochs` and the log count as one epoch.
    waited_s: seconds that the loop has waited for batches.
    """

    steps_per_epoch: int
    waited_s: float

    def iterate(self, start: int, stop: int) -> Generator[Sequence[Batch], None, None]:
        """Yield this rank's micro-batches of the steps from `start` up to `stop`.

        Every rank has the same number of micro-batches in every step. What is yielded for a step
        depends on the config, the seed, the step and the state alone.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that a resumed run needs, the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        ...


class Window(NamedTuple):
    """The part of a longer run that a stage is: steps `first` up to `last` of `total`.

    Learning rate, data order and the steps that a strategy is asked about go on from one window to
    the next. The optimizer starts anew.
    """

    first: int
    last: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training: who learns, from whom, with which losses. `lab.train` runs it.

    All fields are plain values or frozen dataclasses: they say what the result depends on.

    name: names the folders `checkpoints/<name>` and `stages/<name>`.
    role: whose model spec the learner comes from: `student`, or a teacher's name.
    beside: roles of further models that learn in the same engine and are named by passes; the
        stage's model is that of `role`.
    teachers: names of the teachers that may be planned; empty for supervised training.
    labelled_only: train on the rows that carry a label.
    start: the model it begins from (a `ModelSource`), in place of the role's own.
    views: sub-networks that passes may name; every evaluation scores them all. The stage's
        model is cut to the one that `judge` chooses.
    judge: for a stage with views.
    passes_per_backward: at most so many passes keep their activations at a time; None: all.
    episodes: so many times the steps of `train` are taken, the learning rate beginning anew.
    window: the part of a longer run that the stage is; None: all steps of `train`.
    batches: makes the source of the stage's batches out of the training rows'; None takes those.
    reads_states: whether the strategy reads hidden states of both models.
    """

    name: str
    role: str = "student"
    beside: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    objective: tuple[Any, ...] = ()
    strategy: Strategy = field(default_factory=Constant)
    train: Any = None
    deepspeed: Any = None
    labelled_only: bool = False
    start: Any = None
    views: Mapping[str, View] = field(default_factory=dict)
    judge: Judge | None = None
    passes_per_backward: int | None = None
    episodes: int = 1
    window: Window | None = None
    batches: Callable[[BatchSource], BatchSource] | None = None
    reads_states: bool = False


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage: its Hugging Face folder and what its training came to.

    metrics: of what is in the folder. scores: of all views, in the evaluation that chose `view`.
    view: the one that the folder's model was cut to.
    """

    name: str
    folder: Path
    metrics: Mapping[str, float]
    steps: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    scores: Scores = field(default_factory=dict)
    view: str | None = None


def untrained(name: str, folder: Path, seconds: float = 0.0) -> StageResult:
    """The result of a stage that took no step: a model that was made, or scored."""
    return StageResult(
        name=name,
        folder=folder,
        metrics={},
        steps=0,
        seconds=seconds,
        tokens_per_second=0.0,
        peak_memory_bytes=0,
    )


def teacher_names(plan: Sequence[Pass]) -> tuple[str, ...]:
    """The teachers a plan needs, each once, in the plan's order (the same on all ranks)."""
    return tuple(dict.fromkeys(p.teacher for p in plan if p.teacher is not None))
