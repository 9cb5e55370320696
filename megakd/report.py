"""What a run says at its end: report.json, the same as a table, and what both are made from."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, TypedDict

from megakd import atomic
from megakd.evaluation import LOWER_IS_BETTER

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


class ModelReport(TypedDict):
    """A model's size and what it scores; `bytes` is that of its weights on disk."""

    parameters: int
    encoder_parameters: int
    metrics: Mapping[str, float]
    bytes: NotRequired[int]


class CandidateReport(TypedDict):
    """One candidate a method weighed; `iteration` counts from 1."""

    iteration: int
    sparsity: float
    parameters: int
    metric: float
    tradeoff: float
    chosen: bool


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


class Report(TypedDict):
    """The content of report.json; what a method has none of is an empty list or null.

    baselines: name -> metrics of a model of the student's shape that was made another way.
    """

    method: str
    task: str
    metric_name: str
    evaluated_on: Literal["test", "validation"]
    teacher: ModelReport | None
    student: ModelReport
    baselines: Mapping[str, Mapping[str, float]]
    candidates: Sequence[CandidateReport]
    stages: Sequence[StageReport]
    speedup: Speedup | None
    environment: Mapping[str, Any]


def write_report(path: Path, report: Report) -> None:
    """Writes report.json whole or not at all."""
    atomic.write_json(path, report)


def result_table(report: Report, *, final: Path | None = None) -> str:
    """The report as aligned plain text, for the end of a run.

    Args:
        report: the content of report.json.
        final: where the student's folder is.
    """
    lines = [f"{report['method']} on {report['task']}, scored on {report['evaluated_on']}", ""]
    lines += _aligned(_model_rows(report))
    if report["stages"]:
        lines += ["", *_aligned(_stage_rows(report["stages"]))]
        peak = max(stage["peak_memory_bytes"] for stage in report["stages"])
        seconds = sum(stage["seconds"] for stage in report["stages"])
        lines += ["", f"training {_duration(seconds)}, peak memory {_gigabytes(peak)} per rank"]
    if final is not None:
        lines.append(f"the student is in {final}")
    return "\n".join(lines)


def _model_rows(report: Report) -> list[list[str]]:
    student, teacher, speedup = report["student"], report["teacher"], report["speedup"]
    names = list(student["metrics"])
    time_title = "ms" if speedup is None else f"ms (batch {speedup['batch']})"
    titles = ["", "parameters", "encoder", "size MB", *names, "kept", time_title, "speed-up"]
    rows = [titles]
    if teacher is not None:
        time_ms = speedup and speedup["teacher_ms"]
        rows.append(["teacher", *_size(teacher), *_scores(report, teacher["metrics"])])
        rows[-1] += _speed(time_ms, speedup)
    rows.append(["student", *_size(student), *_scores(report, student["metrics"])])
    rows[-1] += _speed(speedup and speedup["student_ms"], speedup)
    for name, metrics in report["baselines"].items():
        rows.append([name, *_size(student), *_scores(report, metrics), *_speed(None, speedup)])
    return rows


def _size(model: ModelReport) -> list[str]:
    size = model.get("bytes")
    counts = (model["parameters"], model["encoder_parameters"])
    return [*(_count(count) for count in counts), "-" if size is None else f"{size / 1e6:,.1f}"]


def _scores(report: Report, metrics: Mapping[str, float]) -> list[str]:
    names = report["student"]["metrics"]
    return [*(_score(name, metrics.get(name)) for name in names), _kept(report, metrics)]


def _score(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if name in LOWER_IS_BETTER else f"{value:.1%}"


def _kept(report: Report, metrics: Mapping[str, float]) -> str:
    """What is left of the teacher's score; a perplexity is kept in inverse proportion."""
    name, teacher = report["metric_name"], report["teacher"]
    mine = metrics.get(name)
    reference = None if teacher is None else teacher["metrics"].get(name)
    if mine is None or reference is None or mine <= 0 or reference <= 0:
        return "-"
    return f"{(reference / mine if name in LOWER_IS_BETTER else mine / reference):.1%}"


def _speed(time_ms: float | None, speedup: Speedup | None) -> list[str]:
    if time_ms is None or speedup is None:
        return ["-", "-"]
    return [f"{time_ms:.2f}", f"{speedup['teacher_ms'] / time_ms:.2f}x"]


def _stage_rows(stages: Sequence[StageReport]) -> list[list[str]]:
    rows = [["stage", "steps", "time", "tokens/s", "peak memory"]]
    for stage in stages:
        speed = f"{stage['tokens_per_second']:,.0f}"
        memory = _gigabytes(stage["peak_memory_bytes"])
        rows.append(
            [stage["name"], f"{stage['steps']:,}", _duration(stage["seconds"]), speed, memory]
        )
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{seconds:.1f}s"


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

    on_gpu = device.type == "cuda"
    return {
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "corpus_content_hash": corpus_content_hash,
    }


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
