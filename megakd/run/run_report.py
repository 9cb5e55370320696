"""The report of a run: scores and latency of the finished models, and what the stages took."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from megakd.contract.results import Report
from megakd.contract.stage import StageResult
from megakd.contract.tasks import STUDENT, TEACHER, TFIDF, THRESHOLD
from megakd.data.choosing import is_labelled
from megakd.data.loader import lengths_of_rows
from megakd.data.reading_report import read_line
from megakd.engine.collectives import doing, on_main
from megakd.engine.memory import forget_models, free_memory_bytes
from megakd.models.forwards import Graph, Timed, batches_of
from megakd.models.loading import load_finished
from megakd.models.lora import adapter_parameters
from megakd.models.model_folder import weight_bytes
from megakd.models.source import parts_of
from megakd.process.phases import phase, seconds
from megakd.reports.derived_warnings import LOSS_ERROR, derived_warnings
from megakd.reports.report_file import environment, read_history
from megakd.reports.table import OF_STAGE
from megakd.run.graphs import GraphRow, remove_graphs, write_graphs
from megakd.run.run_lab import RunLab
from megakd.run.teacher_pool import Measured
from megakd.training.inputs import vocabulary_report
from megakd.training.precision import TORCH_DTYPE, scoring_dtype
from megakd.training.words import score_words

logger = logging.getLogger(__name__)


def report_of(lab: RunLab, student: StageResult, baselines: Mapping[str, StageResult]) -> Report:
    """Score the finished models, measure their latency, and return the report; a collective."""
    config, prepared, record = lab.config, lab.assembly.prepared, lab.record
    teachers, ranks = [*lab.pool.folders], lab.assembly.ranks
    folders = {one.name: one.folder for one in record.assistants} | {STUDENT: student.folder}
    folders |= {name: one.folder for name, one in baselines.items()}
    with phase("scoring"):
        measured = {name: lab.pool.measured(name) for name in teachers}
        for name, folder in folders.items():
            measured[name] = lab.measure(folder)
        reference = max(teachers, key=lambda n: measured[n].report["parameters"], default=None)
        graphs = write_graphs(lab, student.folder, reference, measured)
        words = on_main(lambda: _words(lab)) if config.scores_words else {}
    forget_models()
    theirs = measured[reference].predicted if reference else []
    numbers: dict[str, Any] = _parts(lab, student.folder)
    numbers |= {f"{TFIDF}.{name}": value for name, value in words.items()}
    for name, one in measured.items():
        numbers |= _entries(name, one, folders.get(name), theirs, stored_as=lab.saved_dtype)
        if name != STUDENT and (error := _loss_error(one.losses, measured[STUDENT].losses)):
            numbers[f"{name}.{LOSS_ERROR}"] = error
    for row, entries in graphs.items():
        numbers |= {f"{row.name}.{key}": value for key, value in entries.items()}
    with phase("latency"), doing("measuring latency"):
        numbers |= on_main(lambda: _latency(lab, student.folder, reference, [*graphs]))
    if reference is not None:  # in a pool, `teacher` is the largest
        mine = [key for key in numbers if key.startswith(f"{reference}.")]
        numbers |= {f"{TEACHER}{key.removeprefix(reference)}": numbers[key] for key in mine}
    report: Report = {
        "method": config.method.name,
        "task": config.task.data_name,
        "data": read_line(prepared.splits),
        "metric_name": prepared.metric.name,
        "metrics": [n for n in measured[STUDENT].report["metrics"] if n != THRESHOLD],
        "evaluated_on": "test" if prepared.encoded.test is not None else "validation",
        "models": [
            *(name for name in (*teachers, *folders) if f"{name}.parameters" in numbers),
            *(row.name for row in graphs),
            *([TFIDF] if words else []),
        ],
        "teachers": teachers,
        "assistants": [one.name for one in record.assistants],
        "baselines": [*baselines, *([TFIDF] if words else [])],
        **numbers,
        **{f"{one.name}.sparsity": one.sparsity for one in record.assistants},
        "evaluation_sets": [
            {"set": of_set, "model": name, "rows": row_count(rows), **one.sets[of_set]}
            for of_set, rows in prepared.splits.evaluation_sets.items()
            for name, one in measured.items()
        ],
        "candidates": record.candidates,
        **{f"asked.{key}": value for key, value in (record.asked or {}).items()},
        "pool": [*record.pool["teachers"]] if record.pool else [],
        **({"pool.distribution": record.pool["distribution"]} if record.pool else {}),
        "pruning": record.pruning,
        "stages": [{**{k: getattr(o, k) for k in OF_STAGE}, **o.metrics} for o in lab.results],
        "samples": _samples(lab, measured, reference),
        **vocabulary_report(config, prepared),
        **{f"seconds.{name}": value for name, value in seconds().items()},
        **environment(
            ranks=ranks.world_size,
            device=ranks.device,
            corpus_content_hash=prepared.splits.content_hash,
        ),
    }
    if ranks.is_main:
        remove_graphs(config.output_dir)
    history = config.output_dir / "metrics.jsonl"
    report["warnings"] = on_main(lambda: derived_warnings(report, read_history(history)))
    return report


def _samples(
    lab: RunLab, measured: Mapping[str, Measured], reference: str | None
) -> list[dict[str, str | None]]:
    prompts, mine = lab.pool.prompts, measured[STUDENT].answers
    if prompts is None or mine is None:
        return []
    # A teacher with a tokenizer of its own cannot read the prompts.
    theirs = (measured[reference].answers if reference else None) or [None] * len(mine)
    rows = zip(prompts.shown, theirs, mine, strict=True)
    return [{"prompt": prompt, "teacher": a, "student": b} for prompt, a, b in rows]


def _loss_error(losses: Sequence[float], of_student: Sequence[float]) -> float:
    """Return the standard error of the mean difference of two models' losses; 0 if unknown."""
    if len(losses) != len(of_student) or len(losses) < 2:  # another tokenizer, or a single batch
        return 0.0
    return float(np.std(np.subtract(losses, of_student), ddof=1)) / len(losses) ** 0.5


def _parts(lab: RunLab, folder: Path) -> dict[str, str]:
    ready = lab.assembly.teachers.get(lab.config.start_role)
    if ready is None:  # the student is not made of a teacher
        return {}
    return {f"{STUDENT}.parts": parts_of(lab.source(folder), ready.source, lab.record.layers)}


def _words(lab: RunLab) -> Mapping[str, float]:
    prepared = lab.assembly.prepared
    try:
        return score_words(prepared.splits, prepared.metrics)
    except Exception as error:  # noqa: BLE001 - a comparison must not fail a finished run
        logger.warning("the baseline %s was not scored: %s", TFIDF, error)
        return {}


def row_count(rows: Dataset) -> int:
    """Return the number of scored rows: rows with a label, or all rows of a language task."""
    return int(np.count_nonzero(is_labelled(rows)))


def _entries(
    name: str,
    measured: Measured,
    folder: Path | None,
    theirs: list[int],
    *,
    stored_as: torch.dtype,
) -> dict[str, Any]:
    # The keys of a model; of one in a folder of the run also those of its weights.
    of_model: dict[str, Any] = {**measured.report}
    metrics, confusion = of_model.pop("metrics"), of_model.pop("confusion", {})
    entries = {**of_model, **metrics}
    if confusion:
        entries["confusion"] = [
            {"label": label, "predicted": predicted, "rows": rows}
            for label, counts in confusion.items()
            for predicted, rows in counts.items()
        ]
    if folder is not None:
        entries["bytes"], trained = weight_bytes(folder, stored_as), adapter_parameters(folder)
        entries |= {} if trained is None else {"trained_parameters": trained}
        mine = measured.predicted
        if mine and len(mine) == len(theirs):
            agreed = sum(a == b for a, b in zip(mine, theirs, strict=True))
            entries["agreement"] = agreed / len(mine)
    return {f"{name}.{key}": value for key, value in entries.items()}


def _latency(
    lab: RunLab, student: Path, reference: str | None, graphs: Sequence[GraphRow] = ()
) -> dict[str, Any]:
    config, device = lab.config, lab.assembly.ranks.device
    teacher = lab.pool.folders[reference] if reference else None
    if not config.eval.latency or reference is None or teacher is None:
        return {"batches": []}
    folders = {reference: teacher, STUDENT: student}
    # On a CPU the models are timed in fp32, which doubles weights that are stored in 16 bits.
    room = 3 if device.type == "cpu" else 2
    needed, free = room * sum(map(weight_bytes, folders.values())), free_memory_bytes(device)
    if needed > free:
        logger.warning(
            "latency is not measured: the models need about %.1f GB side by side, and %.1f GB are "
            "free on %s",
            *(needed / 1e9, free / 1e9, device),
        )
        return {"batches": []}
    from megakd.reports.latency import latency_report, measure_latencies

    dtype = scoring_dtype(config.train, device.type)
    try:
        loaded = {
            name: load_finished(folder, "latency", device=device, dtype=TORCH_DTYPE[dtype])
            for name, folder in folders.items()
        }
        models: dict[str, Timed] = {**loaded}
        for row in graphs:
            model = loaded[STUDENT if row.model == STUDENT else reference]
            models[row.name] = Graph(row.path(config.output_dir), model)
        lengths = lengths_of_rows(lab.assembly.prepared.encoded.held_out).tolist()
        rounds = measure_latencies(models, lengths, batches_of(config.task.type))
        return latency_report(rounds, reference, lengths, device=device, dtype=dtype)
    except Exception as error:  # noqa: BLE001 - the code of a model may raise any error
        # All stages are finished and the student is valid: a failed timing must not fail the run.
        logger.warning("latency could not be measured: %s", error)
        return {"batches": []}
