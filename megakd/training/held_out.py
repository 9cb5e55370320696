"""The losses of a stage's objective on held-out rows, without dropout and without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from megakd.contract.unit_counts import count_units
from megakd.engine.collectives import all_reduce_

if TYPE_CHECKING:
    from megakd.contract.batch import Batch
    from megakd.contract.stage import Pass
    from megakd.losses.bundle import StudentBundle
    from megakd.training.trainer import Trainer


def held_out_losses(
    trainer: Trainer, bundle: StudentBundle, plan: Sequence[Pass], batches: Iterable[Batch]
) -> Mapping[str, float]:
    """Return the mean of every loss term over its own unit, the same on every rank; a collective.

    Args:
        trainer: the loop of the stage, with its student and teachers.
        bundle: the module of the student's engine.
        plan: passes of the first learner, without views.
        batches: this rank's micro-batches; every rank has equally many.
    """
    units = bundle.objective.units
    sums = torch.zeros(2, len(units), dtype=torch.float64)
    for batch in batches:
        parts = trainer.student.measure(batch, trainer.ask_teachers(plan, batch), plan).parts
        counts = count_units([batch], bundle.counters)
        for place, (name, unit) in enumerate(units.items()):
            sums[0, place] += parts[name].double().cpu() if name in parts else 0.0
            sums[1, place] += counts[unit].cpu()
    total, count = all_reduce_(sums)
    means = total / count.clamp(min=1)
    return dict(zip(units, means.tolist(), strict=True))
