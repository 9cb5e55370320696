"""Measurement of the importance of a model's layers on held-out rows.

The importance of a layer is the rise of the model's loss on labels if the layer is left out, as in
Shortened LLaMA (Kim et al. 2024, https://arxiv.org/abs/2402.02834, section 3.2, criterion PPL,
which ranks layers in the same order). Each layer is left out alone, from the whole model.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from megakd.engine.activity import doing
from megakd.engine.collectives import agree
from megakd.errors import TeacherError
from megakd.models.knowledge import Needs
from megakd.models.layers import left_out

if TYPE_CHECKING:
    from datasets import Dataset

    from megakd.models.source import ReadyTeacher
    from megakd.training.engines import Assembly

logger = logging.getLogger(__name__)


def measure_layers(assembly: Assembly, ready: ReadyTeacher, rows: Dataset) -> tuple[float, ...]:
    """Return the rise of the loss without each layer, in nats per target; a collective.

    Args:
        assembly: the run, with the task and the tokenizer.
        ready: the model and its config.
        rows: held-out rows.

    Raises:
        TeacherError: a loss is not finite.
        MegakdError: the model or its DeepSpeed config cannot be used.
    """
    dtype, scorer = assembly.teacher_dtype(ready), assembly.scorer()
    count = ready.source.architecture.number_of_layers(ready.source.config)
    model = assembly.frozen(ready.source, ready.spec.deepspeed, dtype=dtype, needs=Needs())
    try:
        losses = [scorer.loss(model.predict, rows)]
        for layer in range(1, count + 1):
            with doing(f"measuring layer {layer} of {count}"), left_out(model.model, layer):
                losses.append(scorer.loss(model.predict, rows))
    finally:
        model.destroy()
    _check_finite(losses)
    # Processors may round differently, but the order of layers must be equal on all ranks.
    scores = agree(tuple(loss - losses[0] for loss in losses[1:]))
    text = "layers: the loss on %d held-out rows is %.3f; without layer 1, 2, … it rises by %s"
    logger.info(text, len(rows), losses[0], " ".join(f"{score:.3f}" for score in scores))
    return scores


def _check_finite(losses: list[float]) -> None:
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        where = f"without layer {bad[0]}" if bad[0] else "with all layers"
        raise TeacherError(
            f"the loss of the teacher on the held-out rows {where} is {losses[bad[0]]}, so that "
            "layers cannot be ranked; set teacher.dtype to fp32, or use another teacher"
        )
