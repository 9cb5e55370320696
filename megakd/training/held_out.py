"""The losses of a stage's objective on held-out rows, without dropout and without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from megakd.contract.metrics import WHOLE
from megakd.contract.unit_counts import SOURCE_UNITS, count_units
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

    A term that is limited to a source (`on`) is left out if the rows have no text of this source.

    Args:
        trainer: the loop of the stage, with its student and teachers.
        bundle: the module of the student's engine.
        plan: passes of the first learner, all of one view, or without views.
        batches: this rank's micro-batches; every rank has equally many.
    """
    units = bundle.objective.units
    prefix = next((f"{planned.view}/" for planned in plan if planned.view), "")
    sums = torch.zeros(2, len(units), dtype=torch.float64)
    for batch in batches:
        parts = trainer.student.measure(batch, trainer.ask_teachers(plan, batch), plan).parts
        counts = count_units([batch], bundle.counters)
        for place, (name, unit) in enumerate(units.items()):
            part = parts.get(prefix + name)
            sums[0, place] += 0.0 if part is None else part.double().cpu()
            sums[1, place] += counts[unit].cpu()
    total, count = all_reduce_(sums)
    found = zip(units, (total / count.clamp(min=1)).tolist(), count.tolist(), strict=True)
    # Without a text of its source, a term has no value.
    return {n: mean for n, mean, number in found if number or units[n] not in SOURCE_UNITS.values()}


def passes_of(view: str, plan: Sequence[Pass]) -> Sequence[Pass]:
    """Return the passes of a view, or all passes of a stage without views."""
    return [planned for planned in plan if planned.view == view] if view != WHOLE else plan
