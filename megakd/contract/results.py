"""Results of a method and of a run: the content of report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict


class ClassReport(TypedDict):
    """Scores of a classifier for one label against all others; `rows` have this label."""

    label: str
    precision: float
    recall: float
    f1: float
    rows: int


class GraphReport(TypedDict):
    """Size on disk and scores of a model as an ONNX graph."""

    bytes: int
    metrics: Mapping[str, float]


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
    batch, tokens, runtime, device: the forward of `speedup`; without `tokens`, texts of the data.
    """

    what: Literal["parameters", "flops", "speedup"]
    value: float
    batch: NotRequired[int]
    tokens: NotRequired[int]
    runtime: NotRequired[str]
    device: NotRequired[str]


class ModelReport(ClassifierReport):
    """Size and scores of a model.

    asked: the size of a student that was cut to a size.
    bytes: size of the weights on disk.
    agreement: share of the rows for which the student predicts the label that the largest teacher
        predicts.
    trained_parameters: number of weights that were trained, if the rest stayed frozen
        (`student.lora`).
    onnx: the student's graph, if the run writes it.
    """

    parameters: int
    encoder_parameters: int
    metrics: Mapping[str, float]
    bytes: NotRequired[int]
    trained_parameters: NotRequired[int]
    agreement: NotRequired[float]
    asked: NotRequired[AskedReport]
    onnx: NotRequired[GraphReport]


class AssistantReport(ModelReport):
    """A teacher assistant: a model between the teacher and the student in size.

    sparsity: share of the teacher's units that the assistant lacks; None if it was not cut.
    """

    name: str
    sparsity: float | None


class PooledReport(ModelReport):
    """Size and scores of one of several teachers, or of a student beside the smallest."""

    name: str


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
    shape: shape of a candidate in words, if candidates of one size differ in shape.
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
    shape: NotRequired[str]


class StageReport(TypedDict):
    """Steps, time, memory and metrics of one stage."""

    name: str
    steps: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    metrics: Mapping[str, float]


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


class Speedup(TypedDict):
    """Median milliseconds of a forward of each model, see `headline_latency`.

    low, high: range of the ratio over the rounds; see `reports.quantities.paired_ratio`.
    """

    batch: int
    teacher_ms: float
    student_ms: float
    low: NotRequired[float]
    high: NotRequired[float]


class LatencyReport(TypedDict):
    """Median milliseconds in which a model does some work; all models are timed by turns.

    model: `student`, `teacher`, or the name of a pooled teacher, an assistant or a baseline.
    batch: texts at a time.
    length: tokens per text; for texts of the data the mean over all held-out rows.
    lengths: tokens of each text of the data that is timed; a batch is padded to its longest text,
        and a time is the mean over the batches. Missing for texts of one length.
    device: name of the device; for a CPU with the number of threads.
    dtype: dtype of the weights.
    rounds_ms: every time; the n-th times of all models are of one round.
    runtime: what runs the model if not torch: `onnxruntime`, always in fp32 on a CPU.
    generated: number of the last tokens of a text that a decoder generates; missing for one
        forward over the texts.
    tokens_per_second: generated tokens of all texts per second, reading the prompts included.
    """

    model: str
    batch: int
    ms: float
    length: NotRequired[int]
    lengths: NotRequired[Sequence[int]]
    device: NotRequired[str]
    dtype: NotRequired[str]
    rounds_ms: NotRequired[Sequence[float]]
    runtime: NotRequired[str]
    generated: NotRequired[int]
    tokens_per_second: NotRequired[float]


def headline_latency(latency: Sequence[LatencyReport]) -> list[LatencyReport]:
    """Return the entries on texts of the data, or on one length if there are no others.

    The entries on generation are left out.
    """
    forwards = [entry for entry in latency if "generated" not in entry]
    return [entry for entry in forwards if "lengths" in entry] or forwards


class SampleReport(TypedDict):
    """A held-out prompt and the most likely tokens of both models for the prompt.

    A decoder continues the prompt; a masked language model fills the masks, in their order.
    teacher: null if the run has no teacher.
    """

    prompt: str
    teacher: str | None
    student: str


class TextReport(TypedDict):
    """A text that the student has generated from a held-out prompt.

    wanted: the completion of the row.
    finished: whether the student has ended the text; False if the text was cut.
    matches: whether the answers of text and row are equal; null if texts are not compared.
    """

    prompt: str
    text: str
    wanted: str
    finished: bool
    matches: bool | None


class GenerationReport(TypedDict):
    """The last evaluation of a stage on generated texts.

    metrics: `match` and the metrics that begin with `text_`.
    texts: the texts for the first prompts.
    """

    stage: str
    step: int
    metrics: Mapping[str, float]
    texts: Sequence[TextReport]


class WarningReport(TypedDict):
    """A warning about the numbers of a run, with what to do.

    kind: see `reports.derived_warnings`.
    """

    kind: str
    message: str


class CostReport(TypedDict):
    """Cost of a method's choice, and the estimated cost of an alternative method.

    seconds: seconds of training, as in `stages`.
    alternative, alternative_does: name and description of the alternative method.
    alternative_seconds: estimated from the speed of this run.
    """

    trials: int
    seconds: float
    alternative: str
    alternative_does: str
    alternative_trials: int
    alternative_seconds: float


class VocabularyReport(TypedDict):
    """The vocabulary that was trained for the student alone.

    size: number of pieces, including special tokens.
    overlap: share of the pieces that the teacher's vocabulary has too.
    """

    type: str
    size: int
    teacher_size: int
    overlap: float


class EvaluationSetReport(TypedDict):
    """A named set of rows, and the metrics of each model on them.

    rows: number of labelled rows; number of texts for a language task.
    metrics: metrics by model: the teachers, `student`, the baselines.
    """

    rows: int
    metrics: Mapping[str, Mapping[str, float]]


class Report(TypedDict):
    """The content of report.json. An empty list or null means that the run has no such entry.

    teacher: the largest teacher if there are several; `teachers` lists all of them.
    assistants: in the order in which they taught.
    sizes: the larger students of a run that makes several.
    baselines: name -> metrics of a model of the student's shape that was trained differently.
    samples: prompts and answers of language models.
    generation: texts that evaluations have generated, an entry per stage.
    evaluation_sets: the sets of `task.evaluation_sets`, by name.
    seconds: wall-clock of the process that finished the run, by phase, up to the report: start
        (libraries, process group), data, models (loading, engines), training (evaluations and
        checkpoints included), scoring, latency.
    """

    method: str
    task: str
    metric_name: str
    evaluated_on: Literal["test", "validation"]
    teacher: ModelReport | None
    teachers: Sequence[PooledReport]
    assistants: Sequence[AssistantReport]
    student: ModelReport
    sizes: Sequence[PooledReport]
    baselines: Mapping[str, Mapping[str, float]]
    candidates: Sequence[CandidateReport]
    stages: Sequence[StageReport]
    speedup: Speedup | None
    latency: Sequence[LatencyReport]
    cost: CostReport | None
    pool: PoolReport | None
    pruning: Sequence[PruningReport]
    vocabulary: VocabularyReport | None
    samples: Sequence[SampleReport]
    generation: Sequence[GenerationReport]
    warnings: Sequence[WarningReport]
    evaluation_sets: Mapping[str, EvaluationSetReport]
    seconds: Mapping[str, float]
    environment: Mapping[str, Any]


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


class SizedStudent(NamedTuple):
    """A student that was cut to a size: its stage, its folder, and the size that was asked for."""

    name: str
    folder: Path
    asked: AskedReport


@dataclass
class MethodRecord:
    """Results that a method adds to the report: compared candidates, assistants used, cost.

    sizes: the students that were cut to a size, the largest first.
    pool: how often each of several teachers taught.
    dev_scores: by name, the scores by which teachers were ranked.
    """

    candidates: list[CandidateReport] = field(default_factory=list)
    assistants: list[Assistant] = field(default_factory=list)
    sizes: list[SizedStudent] = field(default_factory=list)
    cost: CostReport | None = None
    pool: PoolReport | None = None
    pruning: list[PruningReport] = field(default_factory=list)
    dev_scores: dict[str, float] = field(default_factory=dict)
