"""The score of a linear classifier on the vectors of a model that nobody has fine-tuned.

The vector of a text is the mean of the last hidden states over its tokens, or the state of the
first token where the folder says so, as sentence-transformers reads it (`1_Pooling`). A
teacher that scores less than this baseline has lost by fine-tuning what it knew.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from megakd.config.task import FROZEN, STUDENT
from megakd.data.arrow import column_of
from megakd.data.batch import Batch, has_label
from megakd.data.encoding import labelled_only
from megakd.engine.collectives import activity, on_main
from megakd.models.fitting import ModelSource, ReadyTeacher
from megakd.models.outputs import Needs
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.assembly import Assembly
from megakd.training.evaluation import scorer_for
from megakd.training.metrics import TaskMetrics

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

logger = logging.getLogger(__name__)

POOLING = Path("1_Pooling") / "config.json"
MOST_ROWS = 5_000
"""Training rows that are learned at most, of more rows evenly spaced ones."""
NEVER = -1e4
"""The score of a class without a training row."""


class BeforeTuning(NamedTuple):
    """A model before its fine-tuning, and what loads it."""

    source: ModelSource
    opened: AbstractContextManager[FrozenTeacher]


def pretrained_model(assembly: Assembly) -> BeforeTuning | None:
    """Return the pretrained model that a run fine-tunes, as it was; None without one.

    It is that of the first teacher with `finetune`, or without teachers the student.
    """
    sources, specs = assembly.prepared.sources, assembly.config.teacher_specs
    assembly = replace(assembly, teachers_have_heads=False)  # the head is new
    for name, spec in specs.items():
        if spec.finetune is not None and name in sources and sources[name].stored:
            ready = ReadyTeacher(sources[name], spec)
            return BeforeTuning(ready.source, assembly.loaded(ready))
    if specs or not sources[STUDENT].stored:
        return None
    return BeforeTuning(sources[STUDENT], assembly.scored(sources[STUDENT]))


@activity("scoring a regression on frozen vectors")
def score_frozen(assembly: Assembly) -> Mapping[str, float]:
    """Return the metrics on the held-out rows, the same on every rank; a collective.

    Empty if no pretrained model is fine-tuned, or if the labels are of fewer than two classes.
    """
    pretrained = pretrained_model(assembly)
    if pretrained is None:
        return {}
    began, encoded = time.perf_counter(), assembly.prepared.encoded
    rows = labelled_only(encoded.train)
    rows = rows.select(range(0, len(rows), max(1, -(-len(rows) // MOST_ROWS))))
    parts, labels = {"train": rows, "held out": encoded.held_out}, column_of(rows, "label")
    if labels.ndim == 1 and len(np.unique(labels)) < 2:
        return {}
    # Of rows with any number of labels, the validation rows decide the threshold.
    deciding = "held out" if encoded.test is None else "validation"
    if labels.ndim == 2:
        parts[deciding] = encoded.validation
    with pretrained.opened as model:
        vectors = _text_vectors(assembly, pretrained.source, model, parts)

    def score() -> dict[str, float]:
        learned = _regression(vectors["train"], labels)
        classes = np.unique(labels) if labels.ndim == 1 else range(labels.shape[1])

        def scored(part: str, metrics: TaskMetrics) -> dict[str, float]:
            truth = torch.tensor(column_of(parts[part], "label"))
            scores = learned.decision_function(vectors[part])
            if scores.ndim == 1:  # of the second of two classes
                scores = np.stack([-scores, scores], axis=1)
            outputs = torch.full((len(truth), assembly.prepared.classes), NEVER).double()
            outputs[:, classes] = torch.from_numpy(scores).double()
            if truth.dim() == 2:
                truth = truth.double().masked_fill(~has_label(truth), torch.nan)
            return metrics.values(outputs, truth)

        metrics = assembly.prepared.metrics
        if labels.ndim == 2:
            metrics = metrics.decided_on(scored(deciding, metrics))
        return scored("held out", metrics)

    result = on_main(score)
    logger.info("%s: %d labels learned in %.1f s", FROZEN, len(rows), time.perf_counter() - began)
    return result


def _text_vectors(
    assembly: Assembly, source: ModelSource, model: FrozenTeacher, parts: Mapping[str, Dataset]
) -> dict[str, NDArray[np.float32]]:
    scorer, last = scorer_for(assembly), source.depth
    model.ask_for(Needs().with_hidden(last), joins=False)
    takes_first = source.folder is not None and _takes_first(source.folder)

    def pooled(batch: Batch) -> dict[str, Tensor]:
        states, valid = model(batch).states(last).float(), batch.valid.unsqueeze(-1)
        mean = (states * valid).sum(1) / valid.sum(1).clamp(min=1)
        return {"vector": states[:, 0] if takes_first else mean}

    return {part: scorer.answers(pooled, rows)["vector"].numpy() for part, rows in parts.items()}


def _takes_first(folder: Path) -> bool:
    """Return whether the folder says that a text's vector is the state of its first token."""
    try:
        pooling = json.loads((folder / POOLING).read_text(encoding="utf-8"))
        return bool(pooling.get("pooling_mode_cls_token"))
    except (OSError, ValueError, AttributeError):
        return False


def _regression(vectors: NDArray[np.float32], labels: NDArray) -> Pipeline:
    """Return a ridge regression on the labels, whose penalty leave-one-out validation chooses."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    ridge = RidgeClassifierCV(alphas=np.logspace(-1, 5, 13))
    return make_pipeline(StandardScaler(), ridge).fit(vectors, labels)
