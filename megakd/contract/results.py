"""What a method and a run report: the content of report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict


class ClassReport(TypedDict):
    """How well a classifier tells one label from all others; `rows` are those of the label."""

    label: str
    precision: float
    recall: float
    f1: float
    rows: int


class ModelReport(TypedDict):
    """A model's size and what it scores; `bytes` is that of its weights on disk.

    per_class: of a classifier, in the order of the labels.
    """

    parameters: int
    encoder_parameters: int
    metrics: Mapping[str, float]
    bytes: NotRequired[int]
    per_class: NotRequired[Sequence[ClassReport]]


class AssistantReport(ModelReport):
    """A teacher assistant: a model between the teacher and the student in size."""

    name: str
    sparsity: float


class PooledReport(ModelReport):
    """One of several teachers."""

    name: str


class TaughtReport(TypedDict):
    """What one of several teachers had to say.

    weight: the probability that it is drawn, or its share of the loss.
    steps: how many steps of the student it has run in.
    score: that it was ranked by; null where nobody was ranked.
    """

    name: str
    weight: float
    steps: int
    score: float | None


class PoolReport(TypedDict):
    """How several teachers share the student."""

    distribution: str
    teachers: Sequence[TaughtReport]


class CandidateReport(TypedDict):
    """One candidate a method weighed; `iteration` counts from 1.

    tradeoff: metric + lambda * sparsity, all of the same evaluation.
    kept_metric: of the chosen one: what is kept of the target is its own best evaluation, which may
        be another one.
    student_metric: of the student that it has taught, where that was tried.
    """

    iteration: int
    sparsity: float
    parameters: int
    metric: float
    tradeoff: float
    chosen: bool
    kept_metric: NotRequired[float]
    student_metric: NotRequired[float]


class StageReport(TypedDict):
    """What one stage's training came to."""

    name: str
    steps: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    metrics: Mapping[str, float]


class Speedup(TypedDict):
    """Median milliseconds of a forward of each model, measured side by side."""

    batch: int
    teacher_ms: float
    student_ms: float


class LatencyReport(TypedDict):
    """Median milliseconds of one model's forward; all models were timed in turns.

    model: `student`, `teacher`, or the name of a pooled teacher, an assistant or a baseline.
    batch: texts per forward.
    length: tokens per text.
    device: the name of the device; of a CPU with its number of threads.
    dtype: of the weights.
    """

    model: str
    batch: int
    ms: float
    length: NotRequired[int]
    device: NotRequired[str]
    dtype: NotRequired[str]


class SampleReport(TypedDict):
    """A held-out prompt and what the models make of it, both with their most likely tokens.

    A decoder continues the prompt; a masked language model fills its masks, in their order.
    teacher: null if the run has no teacher.
    """

    prompt: str
    teacher: str | None
    student: str


class CostReport(TypedDict):
    """What a method's choice cost, and what another way to make the choice would have cost.

    seconds: of training, as in `stages`.
    alternative, alternative_does: name of the other way, and what is done there.
    alternative_seconds: estimated from the speed of this run.
    """

    trials: int
    seconds: float
    alternative: str
    alternative_does: str
    alternative_trials: int
    alternative_seconds: float


class EvaluationSetReport(TypedDict):
    """A named set of rows, and the metrics of each model on them.

    rows: how many carry a label; of a language task, how many texts there are.
    metrics: by model: the teachers, `student`, the baselines.
    """

    rows: int
    metrics: Mapping[str, Mapping[str, float]]


class Report(TypedDict):
    """The content of report.json; an empty list or null stands for what a method does not have.

    teacher: the largest of several teachers, which `teachers` lists.
    assistants: in the order in which they taught.
    baselines: name -> metrics of a model of the student's shape that was made another way.
    samples: of language models.
    evaluation_sets: those of `task.evaluation_sets`, by name.
    seconds: wall-clock of the start that finished the run, by what it went into, up to the report:
        start (libraries, process group), data, models (loading, engines), training (evaluations
        and checkpoints included), scoring, latency.
    """

    method: str
    task: str
    metric_name: str
    evaluated_on: Literal["test", "validation"]
    teacher: ModelReport | None
    teachers: Sequence[PooledReport]
    assistants: Sequence[AssistantReport]
    student: ModelReport
    baselines: Mapping[str, Mapping[str, float]]
    candidates: Sequence[CandidateReport]
    stages: Sequence[StageReport]
    speedup: Speedup | None
    latency: Sequence[LatencyReport]
    cost: CostReport | None
    pool: PoolReport | None
    samples: Sequence[SampleReport]
    evaluation_sets: Mapping[str, EvaluationSetReport]
    seconds: Mapping[str, float]
    environment: Mapping[str, Any]


class ParameterCounts(NamedTuple):
    """Numbers of weights; `encoder_parameters` leaves out embeddings, pooler and heads."""

    parameters: int
    encoder_parameters: int


class Assistant(NamedTuple):
    """A model between teacher and student."""

    name: str
    sparsity: float
    folder: Path


@dataclass
class MethodRecord:
    """What a method wants to be reported: candidates it weighed, assistants it used, its cost.

    pool: which of several teachers taught how often.
    dev_scores: of teachers by name, that they were ranked by.
    """

    candidates: list[CandidateReport] = field(default_factory=list)
    assistants: list[Assistant] = field(default_factory=list)
    cost: CostReport | None = None
    pool: PoolReport | None = None
    dev_scores: dict[str, float] = field(default_factory=dict)
