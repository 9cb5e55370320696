"""What a method plans: stages, their strategies, their results, and how results are ranked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from megakd.config.task import SOFT_LABELS, STUDENT
from megakd.data.batch import Pass
from megakd.errors import ConfigError
from megakd.plugins import is_metric, metric_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from megakd.data.batch import Counts
    from megakd.models.views import Cut, View


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Results of one optimizer step as device tensors; reading them costs a device sync.

    step: the number of the step, from 0; the steps taken are one more.
    scalars: what the strategy returned after the step.
    """

    step: int
    parts: Mapping[str, Tensor]
    gradient_norm: Tensor | None
    counts: Counts
    passes: Sequence[Pass] = ()
    scalars: Mapping[str, float] = field(default_factory=dict[str, float])


class Strategy:
    """Hooks with which a method controls the training loop; control flow may not differ by rank.

    This base class has no state, and no part in updates. The decisions of a strategy depend only on
    the config, the data and earlier stages: a folder holds the results of one such run.
    """

    def begin(self, student: Any, step: int) -> None:
        """Handle the start of the stage, fresh or resumed, and of each later round of a `Window`.

        `step` is the next step.
        """

    def passes(self, step: int) -> tuple[Pass, ...]:
        """Return at least one pass: a function of (config, seed, step) without side effects.

        The loop may call this for any step, any number of times. During a step, the loop also
        calls this for the next step if a teacher of the stage is idle. A subclass overrides this
        method.
        """
        raise TypeError(
            f"{type(self).__name__} does not implement passes() (called for step {step})"
        )

    def before_update(self, step: int, student: Any) -> None:
        """Handle complete gradients before the optimizer applies them."""

    def after_update(self, report: StepReport) -> Mapping[str, float]:
        """Handle the end of an optimizer step; return values, whose means are logged.

        The values are the same on every rank. A mean is over the steps with a value.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


@dataclass(frozen=True)
class Constant(Strategy):
    """A strategy with the same passes at every step."""

    planned: tuple[Pass, ...] = (Pass(),)

    def passes(self, step: int) -> tuple[Pass, ...]:
        del step
        return self.planned


Scores = Mapping[str, Mapping[str, float]]
"""Metrics of one evaluation, by the name of the view."""


class Verdict(NamedTuple):
    """The outcome of an evaluation. Higher scores win; NaN loses.

    view: the view that the stage returns if this evaluation wins.
    of_views: scores of views whose own best evaluation is kept as well. If the stage returns one of
        these views, the stage returns the weights of that view's best evaluation.
    cut: how the model of this evaluation is cut when written, for a method that prunes during
        training; replaces the units that `view` keeps.
    counts: whether early stopping counts this evaluation.
    """

    score: float
    view: str
    of_views: Mapping[str, float] = MappingProxyType({})
    cut: Cut | None = None
    counts: bool = True


Judge = Callable[[Scores, int], Verdict]
"""Function from the scores of an evaluation and the steps so far to the verdict, which decides
which weights are kept, the same on every rank."""


class Window(NamedTuple):
    """The part of a longer run that a stage covers: steps `first` up to `last` of `total`.

    Learning rate, data order, step numbers of the strategy, the optimizer's moments, learned
    projections, the student's `averages` and random numbers continue from one window to the next,
    also if the model was cut between the windows. Each window but the first starts from the folder
    of the previous window's stage. A `last` beyond `total` is several rounds of `total` steps, each
    from the first learning rate.

    units: the units that remain at the end, if the strategy prunes with `student.keep`; else None.
        The judge's verdict states which units they are (`Verdict.cut`). Such a strategy keeps one
        value for each weight, in `student.averages`.
    """

    first: int
    last: int
    total: int
    units: View | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training: learner, teachers, losses and strategy. `lab.train` runs the stage.

    name: names the folders `checkpoints/<name>` and `stages/<name>`.
    meaning: what the stage is, as a phrase for the report; empty for the student.
    learners: the models that learn in one engine, by role (`student`, or a teacher's name), each
        with the factor of its learning rate. The stage's model is the first; the others are named
        by passes, and are written into folders of the stage's folder that have the names of their
        roles.
    teachers: names of the frozen teachers that passes may use. Without teachers, a stage of one
        learner trains only on the rows that carry a label.
    objective: the loss terms; a pass may replace their weights.
    strategy: plans the passes of each step.
    train: the section `train` of the stage; None: that of the config.
    start: the model that training starts from (a `ModelSource`), in place of the first learner's.
    views: sub-networks that passes may name; every evaluation scores all of them. The stage's
        model is cut to the view that `judge` chooses.
    judge: compares evaluations, and chooses a view; None: by the metric of the run.
    window: the part of a longer run that the stage covers; None: all steps of `train`.
    measured: passes whose losses every evaluation also measures on the held-out rows, without
        dropout, as metrics with the names of the terms; the stage is then also evaluated before
        its first step. Stages with views have none.
    """

    name: str
    meaning: str = ""
    learners: Mapping[str, float] = field(default_factory=lambda: {STUDENT: 1.0})
    teachers: tuple[str, ...] = ()
    objective: tuple[Any, ...] = ()
    strategy: Strategy = field(default_factory=Constant)
    train: Any = None
    start: Any = None
    views: Mapping[str, View] = field(default_factory=dict)
    judge: Judge | None = None
    window: Window | None = None
    measured: tuple[Pass, ...] = ()

    @property
    def role(self) -> str:
        """The role of the first learner, whose model is the stage's result."""
        return next(iter(self.learners))

    @property
    def models(self) -> tuple[str, ...]:
        """The teachers that are models."""
        return tuple(name for name in self.teachers if name != SOFT_LABELS)

    @property
    def beside(self) -> tuple[str, ...]:
        """The roles of the other learners."""
        return tuple(self.learners)[1:]

    @property
    def has_next_window(self) -> bool:
        """True if another window of the run follows: the stage then returns its last step."""
        return self.window is not None and self.window.last < self.window.total

    @property
    def pruned_to(self) -> View | None:
        """The units that remain at the end of a stage that prunes; None: nothing is pruned."""
        return None if self.window is None else self.window.units

    @property
    def labelled_only(self) -> bool:
        """True if only the rows that carry a label are trained on."""
        return not self.teachers and not self.beside


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage: its Hugging Face folder, and the results of its training, if it has steps.

    meaning: see `Stage`; of a measurement, what was measured.
    metrics: metrics of the model in the folder.
    scores: metrics of all views in the evaluation that chose `view`.
    view: the view that the folder's model was cut to.
    """

    name: str
    folder: Path
    meaning: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    scores: Scores = field(default_factory=dict)
    view: str | None = None


LOWER_IS_BETTER = ("perplexity", "loss", "nats_per_character")

LOSSES = ("hard_", "soft_target_", "hidden_", "embedding_", "attention_", "relation_")
"""Beginnings of the names of loss terms, which an evaluation may report too."""


def lower_is_better(name: str) -> bool:
    """Return whether lower values of a metric are better; False if its package is missing."""
    if not is_metric(name):
        return name in LOWER_IS_BETTER or name.startswith(LOSSES)
    try:
        return not getattr(metric_of(name), "higher_is_better", True)
    except ConfigError:
        return False


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of an evaluation, and whether higher values are better."""

    name: str
    parts: tuple[str, ...]
    higher_is_better: bool

    def mean(self, values: Mapping[str, float]) -> float:
        """Return the mean of the official metrics in `parts`."""
        return sum(values[part] for part in self.parts) / len(self.parts)

    def worth(self, values: Mapping[str, float]) -> float:
        """Return the mean, negated if lower values are better."""
        return self.mean(values) if self.higher_is_better else -self.mean(values)


WHOLE = "whole"
"""The key of the model itself where scores are kept by view."""


@dataclass(frozen=True)
class MetricJudge:
    """A judge that compares evaluations by one metric of a view, by its name, or of the model."""

    metric: Metric
    scored: str = WHOLE

    def __call__(self, scores: Scores, step: int) -> Verdict:
        del step
        return Verdict(self.metric.worth(scores[self.scored]), self.scored)
