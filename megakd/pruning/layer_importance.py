"""Measurement of the importance of a model's layers on held-out rows.

The importance of a layer is the rise of the model's loss on labels if the layer is left out, as in
Shortened LLaMA (Kim et al. 2024, https://arxiv.org/abs/2402.02834, section 3.2, criterion PPL,
which ranks layers in the same order). Each layer is left out alone, from the whole model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megakd.engine.collectives import agree
from megakd.errors import TeacherError
from megakd.models.elastic import Elastic
from megakd.models.knowledge import Needs

if TYPE_CHECKING:
    from datasets import Dataset

    from megakd.contract.units import View
    from megakd.training.engines import Assembly, ReadyTeacher


def measure_layers(assembly: Assembly, ready: ReadyTeacher, rows: Dataset) -> tuple[float, ...]:
    """Return the rise of the loss without each layer, in nats per target; a collective.

    Args:
        assembly: the run, with the task and the tokenizer.
        ready: the model and its config, a decoder.
        rows: held-out rows.

    Raises:
        TeacherError: a loss is not finite.
        MegakdError: the model or its DeepSpeed config cannot be used.
    """
    dtype, scorer = assembly.teacher_dtype(ready), assembly.scorer()
    model = assembly.frozen(ready.source, ready.spec.deepspeed, dtype=dtype, needs=Needs())
    try:
        elastic = Elastic(model.model)  # type: ignore[arg-type]
        views = (elastic.units, *_without_each(elastic.units))
        losses: list[float] = []
        for view in views:
            with elastic.viewing(view):
                losses.append(scorer.loss(model.predict, rows))
    finally:
        model.destroy()
    _check_finite(losses)
    # Processors may round differently, but the order of layers must be equal on all ranks.
    return agree(tuple(loss - losses[0] for loss in losses[1:]))


def _without_each(units: View) -> list[View]:
    """Return one view per layer, which has no heads and no neurons there."""
    layers = range(len(units.heads))
    return [
        units._replace(heads=_emptied(units.heads, layer), neurons=_emptied(units.neurons, layer))
        for layer in layers
    ]


def _emptied(counts: tuple[int, ...], layer: int) -> tuple[int, ...]:
    return (*counts[:layer], 0, *counts[layer + 1 :])


def _check_finite(losses: list[float]) -> None:
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        where = f"without layer {bad[0]}" if bad[0] else "with all layers"
        raise TeacherError(
            f"the loss of the teacher on the held-out rows {where} is {losses[bad[0]]}, so that "
            "layers cannot be ranked; set teacher.dtype to fp32, or use another teacher"
        )
