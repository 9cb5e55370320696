"""The report of a run: scores and latency of the finished models, and what the stages took."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from datasets import Dataset

from megakd.config.run import LatencyConfig
from megakd.contract.results import (
    Assistant,
    AssistantReport,
    EvaluationSetReport,
    GraphReport,
    LatencyReport,
    ModelReport,
    Report,
    SizedStudent,
    Speedup,
    StageReport,
    headline_latency,
)
from megakd.contract.stage import StageResult
from megakd.contract.tasks import STUDENT, TaskType
from megakd.data.choosing import is_labelled
from megakd.data.loader import lengths_of_rows
from megakd.engine.activity import doing
from megakd.engine.collectives import on_main
from megakd.engine.memory import forget_models, free_memory_bytes
from megakd.engine.sharding import is_first_rank
from megakd.errors import ModelError
from megakd.inputs.inputs import vocabulary_report
from megakd.inputs.precision import TORCH_DTYPE, scoring_dtype
from megakd.models.lora import adapter_parameters
from megakd.models.model_folder import weight_bytes
from megakd.models.onnx import MODEL, write_onnx
from megakd.process.phases import phase, seconds
from megakd.reports.derived_warnings import derived_warnings
from megakd.reports.history import panels, read_history
from megakd.reports.quantities import paired_ratio
from megakd.reports.report_file import environment
from megakd.reports.samples import samples_of
from megakd.reports.table import generation_reports, largest
from megakd.run.run_lab import RunLab
from megakd.run.teacher_pool import Measured

logger = logging.getLogger(__name__)
GRAPHS = ".graphs"
"""Folder below `output_dir` that exists only while the report is made."""


def report_of(lab: RunLab, student: StageResult, baselines: Mapping[str, StageResult]) -> Report:
    """Score the finished models, measure their latency, and return the report; a collective."""
    config, prepared, ranks = lab.config, lab.assembly.prepared, lab.assembly.ranks
    out = config.output_dir
    sizes = {made.name: made for made in lab.record.sizes}
    students = {name: made.folder for name, made in sizes.items()} | {STUDENT: student.folder}
    students |= {name: made.folder for name, made in baselines.items()}
    with phase("scoring"):
        teachers = {name: lab.pool.measured(name) for name in lab.pool.folders}
        measured = {**teachers, **{name: lab.measure(made) for name, made in students.items()}}
        mine = measured[STUDENT].report
        graph = _graph(lab, student.folder, mine["metrics"]) if config.save.onnx else None
        if graph is not None:
            mine["onnx"] = graph
        assistants = [_assistant(lab, made) for made in lab.record.assistants]
    forget_models()
    with phase("latency"), doing("measuring latency"):
        device = timed_on(lab.record.sizes, ranks.device)
        latency = on_main(lambda: _latency(lab, students, device))
    reports = {name: entry.report for name, entry in measured.items()}
    teacher = largest({name: reports[name] for name in teachers})
    reference = None if teacher is None else teachers[teacher]

    def of_student(name: str) -> ModelReport:
        model = _student(measured[name], students[name], reference)
        return {**model, "asked": sizes[name].asked} if name in sizes else model

    report = Report(
        method=config.method.name,
        task=config.task.data_name,
        metric_name=prepared.metric.name,
        evaluated_on="test" if prepared.encoded.test is not None else "validation",
        teacher=reference and reference.report,
        teachers=[{"name": name, **reports[name]} for name in teachers if config.teachers],
        student=of_student(STUDENT),
        sizes=[{"name": name, **of_student(name)} for name in sizes if name != STUDENT],
        assistants=assistants,
        baselines={name: reports[name]["metrics"] for name in baselines},
        candidates=lab.record.candidates,
        stages=[
            cast("StageReport", {key: getattr(made, key) for key in StageReport.__annotations__})
            for made in lab.results
        ],
        speedup=_speedup(latency, teacher),
        latency=latency,
        cost=lab.record.cost,
        pool=lab.record.pool,
        pruning=lab.record.pruning,
        vocabulary=vocabulary_report(config, prepared),
        samples=samples_of(
            lab.pool.prompts,
            teacher=reference and reference.answers,
            student=measured[STUDENT].answers,
        ),
        generation=on_main(lambda: generation_reports(out, [made.name for made in lab.results])),
        warnings=(),
        evaluation_sets=_set_reports(prepared.splits.evaluation_sets, measured),
        seconds=seconds(),
        environment=environment(
            ranks=ranks.world_size,
            device=ranks.device,
            corpus_content_hash=prepared.splits.whole_hash,
        ),
    )
    if is_first_rank():
        shutil.rmtree(out / GRAPHS, ignore_errors=True)
    report["warnings"] = on_main(
        lambda: derived_warnings(report, panels(read_history(out / "metrics.jsonl")))
    )
    return report


def row_count(rows: Dataset) -> int:
    """Return the number of scored rows: rows with a label, or all rows of a language task."""
    return int(np.count_nonzero(is_labelled(rows)))


def _set_reports(
    rows: Mapping[str, Dataset], models: Mapping[str, Measured]
) -> dict[str, EvaluationSetReport]:
    return {
        name: {
            "rows": row_count(of_set),
            "metrics": {
                model: made.sets[name] for model, made in models.items() if name in made.sets
            },
        }
        for name, of_set in rows.items()
    }


def _student(measured: Measured, folder: Path, teacher: Measured | None) -> ModelReport:
    report: ModelReport = {**measured.report, "bytes": weight_bytes(folder)}
    trained = adapter_parameters(folder)
    if trained is not None:
        report["trained_parameters"] = trained
    mine, theirs = measured.predicted, [] if teacher is None else teacher.predicted
    if mine and len(mine) == len(theirs):
        report["agreement"] = sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(mine)
    return report


def _assistant(lab: RunLab, assistant: Assistant) -> AssistantReport:
    scored = lab.score(assistant.folder)
    return {
        "name": assistant.name,
        "sparsity": assistant.sparsity,
        **scored,
        "bytes": weight_bytes(assistant.folder),
    }


def timed_forwards(
    wanted: LatencyConfig, task: TaskType, sizes: Sequence[SizedStudent]
) -> tuple[tuple[int, ...], int | None]:
    """Return the numbers of texts and of tokens: those that are wanted, and those of a speed-up."""
    asked = [one.asked for one in sizes if one.asked["what"] == "speedup"]
    batches = (*wanted.batches(task), *(one["batch"] for one in asked if "batch" in one))
    lengths = (wanted.tokens, *(one.get("tokens") for one in asked))
    return tuple(dict.fromkeys(batches)), next(filter(None, lengths), None)


def timed_on(sizes: Sequence[SizedStudent], device: torch.device) -> torch.device:
    """Return the device of the speed-up that students were asked for, else that of the run."""
    asked = next((one.asked["device"] for one in sizes if "device" in one.asked), device.type)
    return device if asked == device.type else torch.device(asked)


def _latency(
    lab: RunLab, students: Mapping[str, Path], device: torch.device
) -> list[LatencyReport]:
    config = lab.config
    teachers = {name: folder for name, folder in lab.pool.folders.items() if folder}
    if config.eval.latency is False or not teachers:
        return []
    assistants = {made.name: made.folder for made in lab.record.assistants}
    models = {**teachers, **assistants, **students}
    # On a CPU all models are timed in fp32, which doubles weights that are stored in 16 bits.
    room = 3 if device.type == "cpu" else 2
    needed, free = room * sum(map(weight_bytes, models.values())), free_memory_bytes(device)
    if needed > free:
        logger.warning(
            "latency is not measured: the models need about %.1f GB side by side, and %.1f GB are "
            "free on %s",
            *(needed / 1e9, free / 1e9, device),
        )
        return []
    from megakd.reports.latency import Work, measure_latencies

    try:
        wanted, rows = config.eval.latency, lab.assembly.prepared.encoded.held_out
        batches, tokens = timed_forwards(wanted, config.task.type, lab.record.sizes)
        work = Work(batches, tokens, wanted.generate, of_data=lengths_of_rows(rows).tolist())
        dtype = TORCH_DTYPE[scoring_dtype(config.train, device.type)]
        return measure_latencies(models, work, _graphs(lab, models), device=device, dtype=dtype)
    except Exception as error:  # noqa: BLE001 - the code of a model may raise any error
        # All stages are finished and the student is valid: a failed timing must not fail the run.
        logger.warning("latency could not be measured: %s", error)
        return []


def _graphs(lab: RunLab, models: Mapping[str, Path]) -> dict[str, Path]:
    """Return the student's graph, if it is there, and those of all if a size is a time in ONNX."""
    folder = lab.config.output_dir / GRAPHS
    graphs = {STUDENT: folder / MODEL} if (folder / MODEL).is_file() else {}
    if any(one.asked.get("runtime") == "onnx" for one in lab.record.sizes):
        for name in models.keys() - graphs.keys():
            place = folder / name / MODEL
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_onnx(models[name], to=place)
            except Exception as error:  # noqa: BLE001 - the code of a model may raise any error
                logger.warning("%s is not timed in ONNX Runtime: %s", name, error)
            else:
                graphs[name] = place
    return graphs


def _speedup(latency: Sequence[LatencyReport], teacher: str | None) -> Speedup | None:
    forwards = [entry for entry in headline_latency(latency) if "runtime" not in entry]
    batch = min((entry["batch"] for entry in forwards), default=0)
    of = {entry["model"]: entry for entry in forwards if entry["batch"] == batch}
    if teacher not in of:
        return None
    theirs, mine = of[teacher], of[STUDENT]
    ratio = paired_ratio(theirs.get("rounds_ms", ()), mine.get("rounds_ms", ()))
    times = Speedup(batch=batch, teacher_ms=theirs["ms"], student_ms=mine["ms"])
    return {**times, "low": ratio.low, "high": ratio.high}


def _graph(lab: RunLab, student: Path, metrics: Mapping[str, float]) -> GraphReport | None:
    """Return size and scores of the student's graph; None if it cannot be written."""
    folder = lab.config.output_dir / GRAPHS

    def write() -> int:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_onnx(student, to=folder / MODEL)
        # The weights of a large graph are in a file beside it.
        return sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))

    try:
        return {"bytes": on_main(write), "metrics": metrics}
    except ModelError as error:
        # All stages are finished and the student is valid without a graph.
        logger.warning("save.onnx is left out: %s", error)
        return None
