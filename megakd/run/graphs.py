"""ONNX graphs of the teacher and the student for the report: written, scored and timed.

An encoder that is trained on a CPU will be served on one, so its report has rows of both models as
fp32 and as int8 graphs, if onnxruntime is installed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy

from megakd.contract.batch import IGNORE
from megakd.contract.tasks import LANGUAGE_TASKS, STUDENT, TEACHER, THRESHOLD
from megakd.data.loader import evaluation_batches
from megakd.engine.collectives import doing, on_main
from megakd.models.model_folder import weight_bytes
from megakd.models.onnx import MODEL, MOST_IN_ONE_FILE, OnnxModel, missing_packages, write_onnx
from megakd.models.quantized_graph import Logits, quantize_graph
from megakd.training.assembly import Assembly
from megakd.training.label_sets import decided
from megakd.training.scorer import few

if TYPE_CHECKING:
    from megakd.run.run_lab import RunLab
    from megakd.run.teacher_pool import Measured

_FOLDER = ".graphs"
logger = logging.getLogger(__name__)


class GraphRow(NamedTuple):
    """A row of the report: the graph of a model, as stored (`onnx`) or as `int8`."""

    model: str
    form: Literal["onnx", "int8"]

    @property
    def name(self) -> str:
        return f"{self.model}_{self.form}"

    def path(self, output_dir: Path) -> Path:
        """Return the path of the graph, which exists only while the report is made."""
        return output_dir / _FOLDER / self.name / MODEL


_ROWS = tuple(GraphRow(model, form) for model in (TEACHER, STUDENT) for form in ("onnx", "int8"))
_SAVED = GraphRow(STUDENT, "onnx")


def remove_graphs(output_dir: Path) -> None:
    """Remove the graphs of the report."""
    shutil.rmtree(output_dir / _FOLDER, ignore_errors=True)


def write_graphs(
    lab: RunLab, student: Path, reference: str | None, measured: Mapping[str, Measured]
) -> dict[GraphRow, dict[str, Any]]:
    """Write the graphs of the student and the largest teacher, `reference`; a collective.

    Returns:
        By row: sizes and scores. The logits of an fp32 graph are the model's, so are its scores.
    """
    config, is_encoder = lab.config, _is_served_encoder(lab)
    models = {STUDENT: (lab.assembly, student, measured[STUDENT].report)}
    teacher = lab.pool.folders[reference] if reference else None
    if reference and teacher:
        models[TEACHER] = lab.assembly.of(reference), teacher, measured[reference].report
    is_small = {n: weight_bytes(folder) <= MOST_IN_ONE_FILE for n, (_, folder, _) in models.items()}
    rows = [row for row in _ROWS if is_encoder and is_small.get(row.model)]
    if config.save.onnx and _SAVED not in rows:
        rows.append(_SAVED)

    def write() -> dict[GraphRow, dict[str, Any]]:
        remove_graphs(config.output_dir)
        entries: dict[GraphRow, dict[str, Any]] = {}
        for row in rows:
            assembly, folder, report = models[row.model]
            graph, scores = row.path(config.output_dir), report["metrics"]
            graph.parent.mkdir(parents=True)
            try:
                if row.form == "int8":
                    scores = _quantized(assembly, row, graph, scores.get(THRESHOLD))
                else:
                    stored_as = lab.saved_dtype if row == _SAVED else None
                    write_onnx(folder, to=graph, stored_as=stored_as)
            except Exception as error:  # noqa: BLE001 - onnx and its exporter raise any error
                # All stages are finished, and the student is valid without a graph.
                logger.warning("the report has no row %s: %s", row.name, error)
                continue
            # The weights of a large graph are in a file beside it.
            size = sum(path.stat().st_size for path in graph.parent.iterdir())
            sizes = {key: report[key] for key in ("parameters", "encoder_parameters")}
            entries[row] = {**sizes, **scores, "bytes": size}
        return entries

    if not rows:
        return {}
    with doing("writing ONNX graphs"):
        return on_main(write)


def _is_served_encoder(lab: RunLab) -> bool:
    config, device = lab.config, lab.assembly.ranks.device
    is_served = config.task.type not in LANGUAGE_TASKS and device.type == "cpu"
    return is_served and config.eval.latency and not missing_packages()


def graph_scores(
    assembly: Assembly, threshold: float | None, logits: Logits, *, times: int = 4
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
            return -nats.sum(1) / (labels != IGNORE).sum(1)
        if labels.dim() == 2:  # any number of labels
            guessed = torch.from_numpy(decided(answers.numpy(), threshold or 0.5))
            right = (guessed == (labels == 1)).all(1).double()
            return right.masked_fill(labels[:, 0].isnan(), torch.nan)
        if labels.is_floating_point():
            return -((answers[:, 0] - labels) ** 2)
        right = (answers.argmax(1) == labels).double()
        return right.masked_fill(labels == IGNORE, torch.nan)

    sizes = (1, assembly.scorer().batch_size)
    outputs = [_outputs(assembly, logits, rows, batch_size=size) for size in sizes]
    return torch.stack([torch.cat([score(*one) for one in of])[: len(rows)] for of in outputs])


def _quantized(
    assembly: Assembly, row: GraphRow, graph: Path, threshold: float | None
) -> dict[str, float]:
    whole = row._replace(form="onnx").path(assembly.config.output_dir)
    # Of few rows, one by one they take as long as all in batches.
    scores = partial(graph_scores, assembly, threshold, times=1)
    logger.info("%s: %s", row.name, *quantize_graph(whole, graph, scores))
    rows, scorer = assembly.prepared.encoded.held_out, assembly.scorer()
    batches = _outputs(assembly, OnnxModel(graph).logits, rows, batch_size=scorer.batch_size)
    outputs, labels = zip(*batches, strict=True)
    metrics = replace(scorer.metrics, threshold=threshold)
    return metrics.of(torch.cat(outputs)[: len(rows)], torch.cat(labels)[: len(rows)])


def _outputs(
    assembly: Assembly, logits: Logits, rows: Dataset, *, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the fp64 outputs of a graph and the labels by batch; dummy rows fill the last one."""
    scorer = assembly.scorer()
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
