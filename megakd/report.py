"""What a run says at its end: report.json, and the counts and versions in it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    TypedDict,
)

from megakd import atomic

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

LIBRARIES = ("megakd", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy")
OUTSIDE_THE_ENCODER = frozenset(
    # Embeddings, poolers and heads, as Hugging Face's models name them.
    """embeddings embed_tokens embed_positions word_embeddings wte wpe shared
    pooler pre_classifier classifier score cls lm_head qa_outputs predictions
    generator_predictions discriminator_predictions logits_proj
    vocab_transform vocab_layer_norm vocab_projector""".split()  # noqa: SIM905
)


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
    """What choosing the assistant cost, and what trying every assistant would have cost.

    seconds: of training, as in `stages`. maxidisc_seconds: reckoned from this run's speed.
    """

    trials: int
    seconds: float
    maxidisc_trials: int
    maxidisc_seconds: float


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


def write_report(path: Path, report: Report) -> None:
    """Writes report.json whole or not at all."""
    atomic.write_json(path, report)


class ParameterCounts(NamedTuple):
    """Numbers of weights; `encoder_parameters` leaves out embeddings, pooler and heads."""

    parameters: int
    encoder_parameters: int


def parameter_counts(shapes: Iterable[tuple[str, Sequence[int]]]) -> ParameterCounts:
    """Counts weights from their names and full shapes, tied ones listed once."""
    total = inside = 0
    for name, shape in shapes:
        count = _product(shape)
        total += count
        inside += 0 if OUTSIDE_THE_ENCODER.intersection(name.split(".")) else count
    return ParameterCounts(total, inside)


def named_shapes(model: nn.Module) -> Iterator[tuple[str, Sequence[int]]]:
    """Each parameter's name and full shape, that of a ZeRO-3 shard included."""
    for name, parameter in model.named_parameters():
        yield name, tuple(getattr(parameter, "ds_shape", parameter.shape))


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def environment(
    *, ranks: int, device: torch.device, corpus_content_hash: str | None
) -> dict[str, Any]:
    """What the numbers of a report depend on: versions, ranks, device, data."""
    import torch

    return {
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "corpus_content_hash": corpus_content_hash,
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU's model, or the type of any other device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process held: of the device, or of the host where it is a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
