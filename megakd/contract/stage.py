"""What the rooms say to each other: values that cross a seam, and the protocols behind it.

Shapes: B rows of a micro-batch, T positions, V vocabulary or classes, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megakd.contract.tasks import Kernels

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from megakd.contract.units import View

Unit = str
"""What the sum of a loss term runs over; `unit_counts` names the units of every run."""
Counts = Mapping[Unit, "Tensor"]
"""int64 scalars by unit: of a rank, or summed over all ranks."""
IGNORE = -100


class Batch(NamedTuple):
    """One micro-batch of one rank, aligned so that no loss shifts anything.

    inputs: what the model's forward takes (`input_ids` [B, T], `attention_mask`, …).
    labels: [B] class numbers, [B] scores (float, NaN = none) or [B, T] tokens: the next ones,
        already shifted, or those under the masks; -100 = no label.
    valid: [B, T] bool, False at padding and in rows that only keep the ranks in step.
    rows: [B] int64 numbers of the training rows, on the CPU; -1 where a row only keeps the ranks in
        step, None where nobody counts.
    targets: [N] int64 positions of the flattened [B * T] that a language model is asked about,
        which are the labelled ones, or one at least; None asks about all.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    valid: Tensor
    targets: Tensor | None = None
    rows: Tensor | None = None

    @property
    def target_labels(self) -> Tensor:
        """The labels of what is asked: [N] where there are `targets`, else all of them."""
        return self.labels if self.targets is None else self.labels.flatten()[self.targets]


class Head(Protocol):
    """The output matrix of a language model, [V, D], perhaps sharded until it is opened."""

    def read(self) -> tuple[Tensor, Tensor | None]:
        """(weight [V, D], bias [V] or None), readable while the head is open."""
        ...

    def open(self) -> AbstractContextManager[object]:
        """Keeps the whole weight readable while the context lasts."""
        ...


class AttentionVectors(NamedTuple):
    """What a layer's attention compares and mixes: its heads side by side.

    queries: [B, T, heads * width], turned by their positions where the family does that.
    keys: [B, T, key heads * width], likewise; there may be fewer heads than of queries.
    values: [B, T, key heads * width].
    width: of one head.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    width: int


class TopK(NamedTuple):
    """A language model's most likely next tokens.

    ids: [B, T, k] token numbers; below 0 where there is nothing to say.
    logprobs: [B, T, k] natural logarithms of its softmax over all ids.
    """

    ids: Tensor
    logprobs: Tensor


class Knowledge(NamedTuple):
    """What was read from one model on one micro-batch; a teacher's carries no gradient.

    logits: [B, C] of a classifier or regressor, None for a language model.
    hidden: [B, T, D] input of the LM head, [N, D] at the batch's `targets` where it has them;
        None for a classifier.
    head: the LM head; with `hidden` it stands for logits that are never formed.
    hidden_states: L + 1 tensors [B, T, D] (0 is the embedding output), or empty.
    attention: by layer, numbered as hidden states are; None at 0 and where nobody asked.
    top_k: what is left of a language model's logits in a cache; in place of `hidden` and `head`.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None
    hidden_states: tuple[Tensor, ...] = ()
    attention: tuple[AttentionVectors | None, ...] = ()
    top_k: TopK | None = None


class Losses(NamedTuple):
    """What the student's forward returns; a NamedTuple, or ZeRO-3 does not see the tensors.

    total: scalar with gradient, the sum over passes of scale * weight * sum / count * world.
    parts: detached scalars, sum / count without weight and world size, keyed `[view/]loss`.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Predictions(NamedTuple):
    """What the student's or teacher's forward returns without a plan.

    outputs: [B, C] fp32 logits or scores; None for a language model.
    sums: for a language model `[3]` fp64: summed cross-entropy in nats, right tokens, targets.
    """

    outputs: Tensor | None
    sums: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Who teaches, which sub-network learns, which terms count, in one pass of a step.

    weights: term name -> weight in place of the objective's own; None keeps them. A term of
        weight 0 here is left out: it is neither computed nor reported.
    weigh: the same, asked in the student's forward about what both models said of a micro-batch
        (a `Reading`); on all ranks alike. What it gives multiplies the weights.
    """

    teacher: str | None = None
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

    def expect(self, *, soon: bool) -> None:
        """Told where others of its stage wait too: whether the next step asks it, or another."""
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

    def plan(self, step: int) -> tuple[Pass, ...]:
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
class Planned:
    """A strategy that only plans: it keeps nothing and has no part in an update."""

    def begin(self, student: Any, step: int) -> None:
        """Nothing to do."""

    def plan(self, step: int) -> tuple[Pass, ...]:
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
class Constant(Planned):
    """The strategy that plans the same passes at every step."""

    passes: tuple[Pass, ...] = (Pass(),)

    def plan(self, step: int) -> tuple[Pass, ...]:
        """The same passes, whatever the step."""
        del step
        return self.passes


Scores = Mapping[str, Mapping[str, float]]
"""Metrics by the name of a view, all of one evaluation."""


class Verdict(NamedTuple):
    """The outcome of an evaluation. Higher scores win; NaN loses.

    view: the one that the stage gives if this evaluation wins.
    own: scores of views whose own best evaluation is kept as well. If the stage gives one of these
        views, it gives the weights of that view's best evaluation.
    """

    score: float
    view: str
    own: Mapping[str, float] = MappingProxyType({})


class Judge(Protocol):
    """Says what an evaluation of a stage's views is worth, and which of them it would give."""

    def __call__(self, scores: Scores) -> Verdict:
        """The same on every rank: it decides what is kept."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training: who learns, from whom, with which losses. `lab.train` runs it.

    All fields are plain values or frozen dataclasses: they say what the result depends on.

    name: names the folders `checkpoints/<name>` and `stages/<name>`.
    role: whose model spec the learner comes from: `student`, or a teacher's name.
    teachers: names of the teachers that may be planned; empty for supervised training.
    labelled_only: train on the rows that carry a label.
    start: the model it begins from (a `ModelSource`), in place of the role's own.
    views: sub-networks that passes may name; every evaluation scores them all. The stage's
        model is cut to the one that `judge` chooses.
    judge: for a stage with views.
    passes_per_backward: at most so many passes keep their activations at a time; None: all.
    episodes: so many times the steps of `train` are taken, the learning rate beginning anew.
    reads_states: whether the strategy reads hidden states of both models.
    """

    name: str
    role: str = "student"
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


@dataclass(frozen=True)
class Reading:
    """What a group of terms computes from.

    kernels: the code path of megakd_kernels, as `train.kernels` names it.
    scale: of the pass that it is read for.
    left_out: terms that the pass does without.
    """

    student: Knowledge
    teacher: Knowledge | None
    batch: Batch
    weights: Mapping[str, float]
    per_unit: Mapping[Unit, Tensor]
    kernels: Kernels = "auto"
    scale: float = 1.0
    left_out: frozenset[str] = frozenset()

    @property
    def taught(self) -> Knowledge:
        """What the teacher said."""
        if self.teacher is None:
            raise TypeError("a term that compares with a teacher was planned without one")
        return self.teacher
