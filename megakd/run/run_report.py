"""The report of a run: scores, graphs and latency of the finished models.

An encoder that is trained on a CPU will be served on one, so its report has rows of both models as
fp32 and as int8 graphs, if onnxruntime is installed.
"""

from __future__ import annotations

import logging
import operator
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy

from megakd.config.task import FROZEN, LANGUAGE_TASKS, STUDENT, TEACHER, TFIDF, THRESHOLD
from megakd.data.batch import IGNORE, has_label
from megakd.data.loader import evaluation_batches, lengths_of_rows
from megakd.data.rows import is_labelled
from megakd.data.splits import read_line
from megakd.engine.collectives import activity, on_main
from megakd.engine.memory import device_name, forget_models, free_memory_bytes
from megakd.models.fitting import parts_of
from megakd.models.loading import load_finished
from megakd.models.lora import WEIGHTS, adapter_parameters
from megakd.models.model_folder import weight_bytes
from megakd.models.onnx import (
    MOST_IN_ONE_FILE,
    Logits,
    OnnxModel,
    missing_packages,
    quantize_graph,
    write_onnx,
)
from megakd.models.thresholds import Threshold, is_threshold, threshold_in, with_threshold
from megakd.models.timing import Graph, Timed, batches_of, by_turns, calls_of, sample_lengths
from megakd.process.clock import phase, seconds
from megakd.reports.report_file import (
    GRAPH,
    LOSS_ERROR,
    derived_warnings,
    environment,
    read_history,
    standard_errors,
)
from megakd.reports.table import OF_STAGE
from megakd.run.finished_run import graph_path, remove_graphs
from megakd.run.run_work import RunWork
from megakd.run.teacher_pool import Measured
from megakd.stage import StageResult
from megakd.training.assembly import Assembly
from megakd.training.evaluation import few, scorer_for
from megakd.training.frozen_vectors import score_frozen
from megakd.training.lab import Lab
from megakd.training.metrics import decided, loss_of_guessing, right_shares, same_class
from megakd.training.precision import TORCH_DTYPE, scoring_dtype
from megakd.training.record import Report
from megakd.training.tfidf import score_words

logger = logging.getLogger(__name__)


def latency_report(
    models: Mapping[str, Timed],
    reference: str,
    lengths: Sequence[int],
    batches: Sequence[int],
    *,
    device: torch.device,
    dtype: str,
) -> dict[str, Any]:
    """Time one forward of each model by turns at each batch, the number of texts at a time.

    The texts are as long as those of the data, whose `lengths` are in tokens; a batch is padded to
    its longest text. A causal LM computes the logits of the last position, as it does before it
    generates. The models are left in evaluation mode.

    Returns:
        The report's entries: median milliseconds of a forward, and the speed-up to the model
        `reference`. A speed-up is the median of the ratios of the rounds, with its range: of eight
        or more rounds without the lowest and the highest.
    """
    threads = " (CPU time of one thread)" if device.type == "cpu" else ""
    entries: dict[str, Any] = {
        "batches": [*batches],
        "latency.tokens": round(statistics.fmean(lengths)),
        "latency.device": device_name(device) + threads,
        "latency.dtype": dtype,
    }
    for batch in batches:
        logger.info("timing %s: batches of %d", ", ".join(models), batch)
        texts = sample_lengths(lengths, batch)
        rounds = by_turns([calls_of(model.eval(), texts) for model in models.values()])
        entries[f"latency.rounds_batch_{batch}"] = len(rounds)
        of_models = dict(zip(models, zip(*rounds, strict=True), strict=True))
        for name, times in of_models.items():
            ratios = sorted(a / b for a, b in zip(of_models[reference], times, strict=True))
            outside = 1 if len(ratios) >= 8 else 0
            key = f"{name}.speedup_batch_{batch}"
            entries |= {
                f"{name}.ms_batch_{batch}": statistics.median(times) / len(texts),
                key: statistics.median(ratios),
                f"{key}_low": ratios[outside],
                f"{key}_high": ratios[-1 - outside],
            }
    return entries


def write_graphs(
    lab: Lab[RunWork], student: Path, reference: str | None, measured: Mapping[str, Measured]
) -> dict[str, dict[str, Any]]:
    """Write the graphs of the student and the largest teacher, `reference`; a collective.

    Returns:
        By row (the name of a model, `_` and a form such as int8): sizes and scores. The logits
        of an fp32 graph are the model's, so are its scores.
    """
    config = lab.config
    models = {STUDENT: (lab.work.assembly, student, measured[STUDENT].report)}
    teacher = lab.work.pool.folders[reference] if reference else None
    if reference and teacher:
        models[TEACHER] = lab.work.assembly.for_role(reference), teacher, measured[reference].report
    rows = _served_rows(lab, {name: folder for name, (_, folder, _) in models.items()})
    if config.save.onnx and GRAPH not in rows:
        rows.append(GRAPH)

    def write() -> dict[str, dict[str, Any]]:
        remove_graphs(config.output_dir)
        entries: dict[str, dict[str, Any]] = {}
        for row in rows:
            model, _, form = row.partition("_")
            assembly, folder, report = models[model]
            graph, scores = graph_path(config.output_dir, row), report["metrics"]
            graph.parent.mkdir(parents=True)
            try:
                if form == "int8":
                    scores = _quantized(assembly, model, graph, threshold_in(scores))
                else:
                    saved = lab.work.saved_dtype if row == GRAPH else None
                    write_onnx(folder, to=graph, stored_as=saved)
            except Exception as error:  # noqa: BLE001 - onnx and its exporter raise any error
                # All stages are finished, and the student is valid without a graph.
                logger.warning("the report has no row %s: %s", row, error)
                continue
            # The weights of a large graph are in a file beside it.
            size = sum(path.stat().st_size for path in graph.parent.iterdir())
            sizes = {key: report[key] for key in ("parameters", "encoder_parameters")}
            entries[row] = {**sizes, **with_threshold(scores), "bytes": size}
        return entries

    if not rows:
        return {}
    with activity("writing ONNX graphs"):
        return on_main(write)


def _served_rows(lab: Lab[RunWork], folders: Mapping[str, Path]) -> list[str]:
    """Return the rows of an encoder that is trained on a CPU; none of another model."""
    config, on_cpu = lab.config, lab.work.assembly.ranks.device.type == "cpu"
    is_timed = config.task.type not in LANGUAGE_TASKS and on_cpu and config.eval.latency
    if not is_timed or missing_packages():
        return []
    small = [name for name in folders if weight_bytes(folders[name]) <= MOST_IN_ONE_FILE]
    names = [name for name in (TEACHER, STUDENT) if name in small]
    return [f"{name}_{form}" for name in names for form in ("onnx", "int8")]


def graph_scores(
    assembly: Assembly, threshold: Threshold | None, logits: Logits, *, times: int = 4
) -> Tensor:
    """Return the scores [2, N] of held-out rows, one by one and in batches; see `Scores`.

    Args:
        threshold: see `TaskMetrics`.
        times: see `few`.
    """
    rows = few(assembly.prepared.encoded.held_out, assembly.config.task.type, times=times)

    def score(answers: Tensor, labels: Tensor) -> Tensor:  # [B]
        if answers.ndim == 3:
            nats = cross_entropy(answers.mT, labels, ignore_index=IGNORE, reduction="none")
            return -nats.sum(1) / has_label(labels).sum(1)
        if labels.dim() == 2:  # any number of labels
            guessed = torch.from_numpy(decided(answers.numpy(), threshold or 0.5))
            right = (guessed == (labels == 1)).all(1).double()
            return right.masked_fill(~has_label(labels[:, 0]), torch.nan)
        if labels.is_floating_point():
            return -((answers[:, 0] - labels) ** 2)
        right = torch.from_numpy(right_shares(answers.numpy(), labels.clamp(min=0).numpy()))
        return right.masked_fill(~has_label(labels), torch.nan)

    sizes = (1, scorer_for(assembly).batch_size)
    outputs = [_graph_outputs(assembly, logits, rows, batch_size=size) for size in sizes]
    return torch.stack([torch.cat([score(*one) for one in of])[: len(rows)] for of in outputs])


def _quantized(
    assembly: Assembly, model: str, graph: Path, threshold: Threshold | None
) -> dict[str, float]:
    whole = graph_path(assembly.config.output_dir, f"{model}_onnx")
    # Of few rows, one by one they take as long as all in batches.
    scores = partial(graph_scores, assembly, threshold, times=1)
    logger.info("%s: %s", graph.parent.name, *quantize_graph(whole, graph, scores))
    rows, scorer = assembly.prepared.encoded.held_out, scorer_for(assembly)
    batches = _graph_outputs(assembly, OnnxModel(graph).logits, rows, batch_size=scorer.batch_size)
    outputs, labels = zip(*batches, strict=True)
    metrics = replace(scorer.metrics, threshold=threshold)
    return metrics.values(torch.cat(outputs)[: len(rows)], torch.cat(labels)[: len(rows)])


def _graph_outputs(
    assembly: Assembly, logits: Logits, rows: Dataset, *, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the fp64 outputs of a graph and the labels by batch; dummy rows fill the last one."""
    scorer = scorer_for(assembly)
    for batch in evaluation_batches(
        rows, scorer.collate, batch_size=batch_size, rank=0, world=1, masking=scorer.masking
    ):
        # Without the padding that no service adds. Dummy rows have at least one token.
        width = max(1, int(batch.valid.sum(1).max()))
        inputs = {"attention_mask": batch.valid.long(), **batch.inputs}
        inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
        answers = logits({name: one[:, :width].contiguous() for name, one in inputs.items()})
        labels = batch.labels[:, :width] if answers.ndim == 3 else batch.labels
        yield torch.from_numpy(answers).double(), labels


def report_of(
    lab: Lab[RunWork], student: StageResult, baselines: Mapping[str, StageResult]
) -> Report:
    """Score the finished models, measure their latency, and return the report; a collective."""
    config, prepared, record = lab.config, lab.work.assembly.prepared, lab.record
    teachers, ranks = [*lab.work.pool.folders], lab.work.assembly.ranks
    folders = {one.name: one.folder for one in record.assistants} | {STUDENT: student.folder}
    folders |= {name: one.folder for name, one in baselines.items()}
    with phase("scoring"):
        measured = {name: lab.work.pool.measured(name) for name in teachers}
        for name, folder in folders.items():
            measured[name] = lab.work.measure(folder)
        reference = max(teachers, key=lambda n: measured[n].report["parameters"], default=None)
        graphs = write_graphs(lab, student.folder, reference, measured)
        untrained = _untrained(lab)
    forget_models()
    theirs = measured[reference].predicted if reference else []
    numbers: dict[str, Any] = _parts(lab, student.folder)
    for baseline, values in untrained.items():
        numbers |= {f"{baseline}.{name}": value for name, value in values.items()}
    for name, one in measured.items():
        numbers |= _entries(name, one, folders.get(name), theirs, stored_as=lab.work.saved_dtype)
        if name != STUDENT and (error := _loss_error(one.losses, measured[STUDENT].losses)):
            numbers[f"{name}.{LOSS_ERROR}"] = error
    for name, stored in lab.work.pool.folders.items():
        # In the dtype of the student, as sizes are compared; there are none in other formats.
        if stored is not None and (size := weight_bytes(stored, lab.work.saved_dtype)):
            numbers[f"{name}.bytes"] = size
    for row, entries in graphs.items():
        numbers |= {f"{row}.{key}": value for key, value in entries.items()}
    numbers |= _of_rows(lab, numbers) | _latency(lab, student.folder, reference, [*graphs])
    if reference is not None:  # in a pool, `teacher` is the largest
        mine = [key for key in numbers if key.startswith(f"{reference}.")]
        numbers |= {f"{TEACHER}{key.removeprefix(reference)}": numbers[key] for key in mine}
    report: Report = {
        "method": config.method.name,
        "task": config.task.data_name,
        "data": read_line(prepared.splits),
        "metric_name": prepared.metric.name,
        "metrics": [n for n in measured[STUDENT].report["metrics"] if not is_threshold(n)],
        "evaluated_on": "test" if prepared.encoded.test is not None else "validation",
        "models": [
            *(name for name in (*teachers, *folders) if f"{name}.parameters" in numbers),
            *graphs,
            *untrained,
        ],
        "teachers": teachers,
        "assistants": [one.name for one in record.assistants],
        "baselines": [*baselines, *untrained],
        **numbers,
        **{f"{one.name}.sparsity": one.sparsity for one in record.assistants},
        "evaluation_sets": [
            {
                "set": of_set,
                "model": name,
                "rows": row_count(rows),
                **with_threshold(one.sets[of_set]),
            }
            | (standard_errors(one.sets[of_set], row_count(rows)) if "rows" in numbers else {})
            for of_set, rows in prepared.splits.evaluation_sets.items()
            for name, one in measured.items()
        ],
        "candidates": record.candidates,
        **{f"asked.{key}": value for key, value in (record.asked or {}).items()},
        "pool": [*record.pool["teachers"]] if record.pool else [],
        **({"pool.distribution": record.pool["distribution"]} if record.pool else {}),
        "pruning": record.pruning,
        "stages": [
            {
                **{k: getattr(o, k) for k in OF_STAGE},
                "meaning": o.meaning,
                **with_threshold(o.metrics),
            }
            for o in lab.results
        ],
        "samples": _samples(lab, measured, reference),
        **({} if prepared.pair is None else prepared.pair.summary()),
        **{f"seconds.{name}": value for name, value in seconds().items()},
        **environment(
            ranks=ranks.world_size,
            device=ranks.device,
            corpus_content_hash=prepared.splits.content_hash,
        ),
    }
    history = config.output_dir / "metrics.jsonl"
    guess = loss_of_guessing(prepared.splits.held_out, len(prepared.tokenizer))
    known = {**report, "loss_of_guessing": guess}
    report["warnings"] = on_main(lambda: derived_warnings(known, read_history(history)))
    return report


def _samples(
    lab: Lab[RunWork], measured: Mapping[str, Measured], reference: str | None
) -> list[dict[str, str | None]]:
    prompts, mine = lab.work.pool.prompts, measured[STUDENT].answers
    if prompts is None or mine is None:
        return []
    # A teacher with a tokenizer of its own cannot read the prompts.
    theirs = (measured[reference].answers if reference else None) or [None] * len(mine)
    rows = zip(prompts.shown, theirs, mine, strict=True)
    return [{"prompt": prompt, "teacher": a, "student": b} for prompt, a, b in rows]


def _of_rows(lab: Lab[RunWork], scores: Mapping[str, object]) -> dict[str, float]:
    """Return the number of scored rows and the errors of shares of them; none of texts."""
    if lab.config.task.type in LANGUAGE_TASKS:
        return {}
    rows = row_count(lab.work.assembly.prepared.splits.held_out)
    return {"rows": rows, **standard_errors(scores, rows)}


def _loss_error(losses: Sequence[float], of_student: Sequence[float]) -> float:
    """Return the standard error of the mean difference of two models' losses; 0 if unknown."""
    if len(losses) != len(of_student) or len(losses) < 2:  # another tokenizer, or a single batch
        return 0.0
    return float(np.std(np.subtract(losses, of_student), ddof=1)) / len(losses) ** 0.5


def _parts(lab: Lab[RunWork], folder: Path) -> dict[str, str]:
    ready = lab.work.assembly.teachers.get(lab.config.start_role)
    if ready is None:  # the student is not made of a teacher
        return {}
    return {f"{STUDENT}.parts": parts_of(lab.source(folder), ready.source, lab.record.layers)}


def _untrained(lab: Lab[RunWork]) -> dict[str, Mapping[str, object]]:
    """Return the metrics of the baselines that are no models of a run; a collective."""
    assembly, scored = lab.work.assembly, dict[str, Mapping[str, float]]()
    prepared, names = assembly.prepared, lab.config.untrained_baselines

    def words() -> Mapping[str, float]:
        try:
            return score_words(prepared.splits, prepared.metrics)
        except Exception as error:  # noqa: BLE001 - a comparison must not fail a finished run
            logger.warning("the baseline %s was not scored: %s", TFIDF, error)
            return {}

    if TFIDF in names:
        scored[TFIDF] = on_main(words)
    if FROZEN in names:
        scored[FROZEN] = score_frozen(assembly)
    return {name: with_threshold(values) for name, values in scored.items() if values}


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
    metrics = of_model.pop("metrics")
    entries = {**of_model, **with_threshold(metrics)}
    if folder is not None:
        entries["bytes"] = weight_bytes(folder, stored_as)
        if (folder / WEIGHTS).is_file():
            entries["trained_parameters"] = adapter_parameters(folder)
        mine = measured.predicted
        if mine and len(mine) == len(theirs):
            same = operator.eq if THRESHOLD in entries else same_class
            entries["agreement"] = statistics.fmean(map(same, mine, theirs))
    return {f"{name}.{key}": value for key, value in entries.items()}


def _latency(
    lab: Lab[RunWork], student: Path, reference: str | None, graphs: Sequence[str] = ()
) -> dict[str, Any]:
    teacher = lab.work.pool.folders[reference] if reference else None
    if not lab.config.eval.latency or reference is None or teacher is None:
        return {"batches": []}
    folders = {reference: teacher, STUDENT: student}
    with phase("latency"), activity("measuring latency"):
        return on_main(lambda: _times(lab, folders, reference, graphs))


def _times(
    lab: Lab[RunWork], folders: Mapping[str, Path], reference: str, graphs: Sequence[str]
) -> dict[str, Any]:
    config, device = lab.config, lab.work.assembly.ranks.device
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

    dtype = scoring_dtype(config.train, device.type)
    try:
        loaded = {
            name: load_finished(folder, "latency", device=device, dtype=TORCH_DTYPE[dtype])
            for name, folder in folders.items()
        }
        models: dict[str, Timed] = {**loaded}
        for row in graphs:
            model = loaded[STUDENT if row.startswith(STUDENT) else reference]
            models[row] = Graph(graph_path(config.output_dir, row), model)
        lengths = lengths_of_rows(lab.work.assembly.prepared.encoded.held_out).tolist()
        batches = batches_of(config.task.type)
        return latency_report(models, reference, lengths, batches, device=device, dtype=dtype)
    except Exception as error:  # noqa: BLE001 - the code of a model may raise any error
        # All stages are finished and the student is valid: a failed timing must not fail the run.
        logger.warning("latency could not be measured: %s", error)
        return {"batches": []}
