"""The losses of a stage on held-out rows, measured in the forwards that score the rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch

from megakd.contract.batch import SOURCE_UNITS, Batch, Predictions, count_units
from megakd.contract.results import WHOLE
from megakd.contract.stage import Pass
from megakd.engine.collectives import all_reduce_
from megakd.losses.bundle import StudentBundle
from megakd.training.trainer import Trainer


class HeldOutLosses:
    """Means of the loss terms by view; a micro-batch asks each teacher and runs each view once."""

    def __init__(
        self,
        trainer: Trainer,
        bundle: StudentBundle,
        plan: Sequence[Pass],
        views: Sequence[str],
    ) -> None:
        self._trainer, self._bundle, self._plan = trainer, bundle, plan
        self._views = {view: None if view == WHOLE else view for view in views}
        # A row for each view, and the counts, which all views share.
        terms = len(bundle.objective.units)
        self._sums = torch.zeros(len(views) + 1, terms, dtype=torch.float64)

    def add(self, batch: Batch) -> dict[str, Predictions]:
        """Measure a micro-batch, of which every rank has equally many; return its predictions."""
        names = tuple(self._views.values())
        answers = self._trainer.ask_teachers(self._plan, batch)
        measured = self._trainer.student.measure(batch, answers, self._plan, names)
        counts = count_units([batch], self._bundle.counters)
        for place, (term, unit) in enumerate(self._bundle.objective.units.items()):
            for row, name in enumerate(names):
                part = measured.parts.get(f"{name}/{term}" if name else term)
                self._sums[row, place] += 0.0 if part is None else part.double().cpu()
            self._sums[-1, place] += counts[unit].cpu()
        made = measured.predictions
        return {view: made[name] for view, name in self._views.items() if name in made}

    def means(self) -> dict[str, dict[str, float]]:
        """Return the mean of every term over its own unit, by view; a collective.

        A term limited to a source (`on`) is left out if the rows have no text of this source. A
        view that no pass trains has no means.
        """
        learning = {one.view for one in self._plan}
        units, (*sums, count) = self._bundle.objective.units, all_reduce_(self._sums)
        known = [
            n or u not in SOURCE_UNITS.values() for n, u in zip(count, units.values(), strict=True)
        ]
        means = ((total / count.clamp(min=1)).tolist() for total in sums)
        return {
            view: dict(compress(zip(units, values, strict=True), known))
            for (view, name), values in zip(self._views.items(), means, strict=True)
            if name in learning
        }
