"""Results of a method and of a run, and the metric that decides between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from megakd.contract.plugins import is_metric, metric_of
from megakd.contract.stage import Scores, Verdict
from megakd.errors import ConfigError

Report = dict[str, Any]
"""The content of report.json: one flat mapping, see docs/report.md.

A number of a model has the key `NAME.NUMBER`, such as `student.accuracy`; `teacher` is the largest
teacher. Lists hold names, texts, or rows such as those of the stages.
"""


class ClassReport(TypedDict):
    """Scores of a classifier for one label against all others; `rows` have this label."""

    label: str
    precision: float
    recall: float
    f1: float
    rows: int


class ClassifierReport(TypedDict):
    """Scores of a classifier in addition to its metrics; a model of another task has none.

    per_class: scores for each label, in the order of the labels.
    confusion: by label, and by predicted label, the number of rows; pairs without rows are missing.
    calibration_error: expected calibration error, see `scoring.metrics.calibration_error`.
    """

    per_class: NotRequired[Sequence[ClassReport]]
    confusion: NotRequired[Mapping[str, Mapping[str, int]]]
    calibration_error: NotRequired[float]


class AskedReport(TypedDict):
    """The size that a student was asked to have.

    what: whether `value` is a number of weights, a share of the multiplications in the teacher's
        layers, or the teacher's time relative to the student's.
    """

    what: Literal["parameters", "flops", "speedup"]
    value: float


class ModelReport(ClassifierReport):
    """Size and scores of a model."""

    parameters: int
    encoder_parameters: int
    metrics: Mapping[str, float]


class TaughtReport(TypedDict):
    """Contribution of one of several teachers to the training of the student.

    weight: probability that the teacher is drawn, or the teacher's share of the loss.
    steps: number of the student's steps in which the teacher ran.
    rows: number of training rows that learn from this teacher alone; null if rows are not assigned
        to teachers, missing in reports of earlier versions.
    score: score by which the teacher was ranked; null if teachers were not ranked.
    """

    name: str
    weight: float
    steps: int
    rows: NotRequired[int | None]
    score: float | None


class PoolReport(TypedDict):
    """Contributions of several teachers, and the distribution they were drawn or weighed with."""

    distribution: str
    teachers: Sequence[TaughtReport]


class CandidateReport(TypedDict):
    """One candidate that a method compared; `iteration` counts from 1.

    metric_name: by which the method compares candidates; not always the main metric of the run.
    tradeoff: metric + lambda * sparsity; all candidates are scored in the same evaluation.
    kept_metric: metric of the weights that were kept, only for the chosen candidate. If the target
        was chosen, its own best evaluation is kept, which may be another evaluation.
    student_metric: metric of the student that the candidate has taught, if such a student was
        trained.
    """

    iteration: int
    sparsity: float
    parameters: int
    metric_name: str
    metric: float
    tradeoff: float
    chosen: bool
    kept_metric: NotRequired[float]
    student_metric: NotRequired[float]


class PruningReport(TypedDict):
    """The student of a method that prunes during training, at one evaluation.

    width: columns of the hidden states.
    parameters: weights of the student as the export would cut it.
    teacher_kl: `soft_target_kl` on held-out rows, in nats per target, times T^2 at a temperature T
        other than 1; null if the objective has no such term.
    step_seconds: median duration of the steps since the previous row; null without such a step.
    """

    step: int
    width: int
    parameters: int
    teacher_kl: float | None
    step_seconds: float | None


class ParameterCounts(NamedTuple):
    """Numbers of weights; `encoder_parameters` excludes embeddings, pooler, decoder and heads."""

    parameters: int
    encoder_parameters: int


class Assistant(NamedTuple):
    """A teacher assistant: a model between the teacher and the student in size.

    sparsity: share of the teacher's units that the assistant lacks; None if it was not cut.
    """

    name: str
    sparsity: float | None
    folder: Path


@dataclass
class MethodRecord:
    """Results that a method adds to the report: compared candidates, assistants used, cost.

    asked: the size that the student was cut to.
    pool: how often each of several teachers taught.
    dev_scores: by name, the scores by which teachers were ranked.
    """

    candidates: list[CandidateReport] = field(default_factory=list)
    assistants: list[Assistant] = field(default_factory=list)
    asked: AskedReport | None = None
    pool: PoolReport | None = None
    pruning: list[PruningReport] = field(default_factory=list)
    dev_scores: dict[str, float] = field(default_factory=dict)


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

    def of(self, values: Mapping[str, float]) -> float:
        """Return the mean of the official metrics in `parts`."""
        return sum(values[part] for part in self.parts) / len(self.parts)

    def worth(self, values: Mapping[str, float]) -> float:
        """Return the mean, negated if lower values are better."""
        return self.of(values) if self.higher_is_better else -self.of(values)


WHOLE = "whole"
"""The key of the model itself where scores are kept by view."""


@dataclass(frozen=True)
class MetricJudge:
    """A judge that compares evaluations by one metric of one view, or of the model itself."""

    metric: Metric
    view: str = WHOLE

    def __call__(self, scores: Scores, step: int) -> Verdict:
        del step
        return Verdict(self.metric.worth(scores[self.view]), self.view)
