"""The report of a run: scores and latency of the finished models, and what the stages took."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from megakd.contract.results import Report
from megakd.contract.stage import StageResult
from megakd.contract.tasks import STUDENT, TEACHER
from megakd.data.choosing import is_labelled
from megakd.data.loader import lengths_of_rows
from megakd.engine.activity import doing
from megakd.engine.collectives import on_main
from megakd.engine.memory import forget_models, free_memory_bytes
from megakd.engine.sharding import is_first_rank
from megakd.errors import ModelError
from megakd.inputs.inputs import vocabulary_report
from megakd.inputs.precision import TORCH_DTYPE, scoring_dtype
from megakd.models.forwards import batches_of
from megakd.models.lora import adapter_parameters
from megakd.models.model_folder import weight_bytes
from megakd.models.onnx import MODEL, write_onnx
from megakd.process.phases import phase, seconds
from megakd.reports.derived_warnings import derived_warnings
from megakd.reports.history import read_history
from megakd.reports.report_file import GRAPH, environment
from megakd.reports.samples import samples_of
from megakd.run.run_lab import RunLab
from megakd.run.teacher_pool import Measured

logger = logging.getLogger(__name__)
GRAPHS = ".graphs"
"""Folder below `output_dir` that exists only while the report is made."""


def report_of(lab: RunLab, student: StageResult, baselines: Mapping[str, StageResult]) -> Report:
    """Score the finished models, measure their latency, and return the report; a collective."""
    config, prepared, record = lab.config, lab.assembly.prepared, lab.record
    students = {STUDENT: student.folder, **{n: b.folder for n, b in baselines.items()}}
    teachers = [*lab.pool.folders]
    assistants = {made.name: made.folder for made in record.assistants}
    with phase("scoring"):
        measured = {name: lab.pool.measured(name) for name in teachers}
        measured |= {name: lab.measure(folder) for name, folder in students.items()}
        for name, folder in assistants.items():
            measured[name] = Measured(lab.score(folder), {}, None, [])
        graph_bytes = _graph_bytes(lab, student.folder) if config.save.onnx else None
    forget_models()
    graph = {} if graph_bytes is None else {GRAPH: measured[STUDENT]}
    report: Report = {
        "method": config.method.name,
        "task": config.task.data_name,
        "metric_name": prepared.metric.name,
        "metrics": [*measured[STUDENT].report["metrics"]],
        "evaluated_on": "test" if prepared.encoded.test is not None else "validation",
        "models": [*teachers, *assistants, STUDENT, *graph, *baselines],
        "teachers": teachers,
        "assistants": [*assistants],
        "baselines": [*baselines],
        **{f"{made.name}.sparsity": made.sparsity for made in record.assistants},
    }
    reference = max(teachers, key=lambda n: measured[n].report["parameters"], default=None)
    theirs = measured[reference].predicted if reference else []
    for name, one in (measured | graph).items():
        report |= _entries(name, one, (students | assistants).get(name), theirs)
    report |= {} if graph_bytes is None else {f"{GRAPH}.bytes": graph_bytes}
    with phase("latency"), doing("measuring latency"):
        report |= on_main(lambda: _latency(lab, students, reference=reference))
    if reference is not None:  # in a pool, `teacher` is the largest
        mine = [key for key in report if key.startswith(f"{reference}.")]
        report |= {f"{TEACHER}{key.removeprefix(reference)}": report[key] for key in mine}
    report |= _course(lab, report)
    answers = [measured[name].answers if name else None for name in (reference, STUDENT)]
    report["samples"] = samples_of(lab.pool.prompts, teacher=answers[0], student=answers[1])
    if is_first_rank():
        shutil.rmtree(config.output_dir / GRAPHS, ignore_errors=True)
    report["warnings"] = on_main(
        lambda: derived_warnings(report, read_history(config.output_dir / "metrics.jsonl"))
    )
    return report


def _course(lab: RunLab, report: Report) -> dict[str, Any]:
    # What the run did: its data, stages and choices, their cost, and the machine.
    record, prepared, ranks = lab.record, lab.assembly.prepared, lab.assembly.ranks
    sets, pool = prepared.splits.evaluation_sets, record.pool
    of_stage = ("name", "steps", "seconds", "tokens_per_second", "peak_memory_bytes")
    return {
        "evaluation_sets": [*sets],
        **{f"{name}.rows": row_count(rows) for name, rows in sets.items()},
        "candidates": record.candidates,
        **{f"asked.{key}": value for key, value in (record.asked or {}).items()},
        "pool": [] if pool is None else [*pool["teachers"]],
        **({} if pool is None else {"pool.distribution": pool["distribution"]}),
        "pruning": record.pruning,
        "stages": [{**{k: getattr(o, k) for k in of_stage}, **o.metrics} for o in lab.results],
        **vocabulary_report(lab.config, prepared),
        **{f"seconds.{name}": value for name, value in seconds().items()},
        **environment(
            ranks=ranks.world_size,
            device=ranks.device,
            corpus_content_hash=prepared.splits.whole_hash,
        ),
    }


def row_count(rows: Dataset) -> int:
    """Return the number of scored rows: rows with a label, or all rows of a language task."""
    return int(np.count_nonzero(is_labelled(rows)))


def _entries(
    name: str, measured: Measured, folder: Path | None, theirs: list[int]
) -> dict[str, Any]:
    # The keys of a model; of one in a folder of the run also those of its weights.
    of_model: dict[str, Any] = {**measured.report}
    metrics, confusion = of_model.pop("metrics"), of_model.pop("confusion", {})
    entries = {**of_model, **metrics}
    for of_set, values in measured.sets.items():
        entries |= {f"{of_set}.{metric}": value for metric, value in values.items()}
    if confusion:
        entries["confusion"] = [
            {"label": label, "predicted": predicted, "rows": rows}
            for label, counts in confusion.items()
            for predicted, rows in counts.items()
        ]
    if folder is not None:
        entries["bytes"], trained = weight_bytes(folder), adapter_parameters(folder)
        entries |= {} if trained is None else {"trained_parameters": trained}
        mine = measured.predicted
        if mine and len(mine) == len(theirs):
            agreed = sum(a == b for a, b in zip(mine, theirs, strict=True))
            entries["agreement"] = agreed / len(mine)
    return {f"{name}.{key}": value for key, value in entries.items()}


def _latency(lab: RunLab, students: Mapping[str, Path], *, reference: str | None) -> dict[str, Any]:
    config, device = lab.config, lab.assembly.ranks.device
    teachers = {name: folder for name, folder in lab.pool.folders.items() if folder}
    if not config.eval.latency or not teachers:
        return {"batches": []}
    models = teachers | {made.name: made.folder for made in lab.record.assistants} | {**students}
    # On a CPU all models are timed in fp32, which doubles weights that are stored in 16 bits.
    room = 3 if device.type == "cpu" else 2
    needed, free = room * sum(map(weight_bytes, models.values())), free_memory_bytes(device)
    if needed > free:
        logger.warning(
            "latency is not measured: the models need about %.1f GB side by side, and %.1f GB are "
            "free on %s",
            *(needed / 1e9, free / 1e9, device),
        )
        return {"batches": []}
    from megakd.reports.latency import latency_report, measure_latencies

    try:
        batches = batches_of(config.task.type)
        lengths = lengths_of_rows(lab.assembly.prepared.encoded.held_out).tolist()
        dtype, graph = scoring_dtype(config.train, device.type), config.output_dir / GRAPHS / MODEL
        graphs = {STUDENT: graph} if graph.is_file() else {}
        rounds = measure_latencies(
            models, lengths, batches, graphs, device=device, dtype=TORCH_DTYPE[dtype]
        )
        return latency_report(rounds, reference, lengths, device=device, dtype=dtype)
    except Exception as error:  # noqa: BLE001 - the code of a model may raise any error
        # All stages are finished and the student is valid: a failed timing must not fail the run.
        logger.warning("latency could not be measured: %s", error)
        return {"batches": []}


def _graph_bytes(lab: RunLab, student: Path) -> int | None:
    """Return the size of the student's graph; None if it cannot be written."""
    folder = lab.config.output_dir / GRAPHS

    def write() -> int:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_onnx(student, to=folder / MODEL)
        # The weights of a large graph are in a file beside it.
        return sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))

    try:
        return on_main(write)
    except ModelError as error:
        # All stages are finished and the student is valid without a graph.
        logger.warning("save.onnx is left out: %s", error)
        return None
