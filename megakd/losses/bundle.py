"""The module a student engine owns: the student and everything differentiable beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megakd.contract.stage import (
    Batch,
    Counts,
    Knowledge,
    Losses,
    Pass,
    Predictions,
    Reading,
    Unit,
)
from megakd.contract.tasks import Kernels
from megakd.contract.unit_counts import unit_weights
from megakd.contract.units import View
from megakd.losses.objective import WEIGHTED_LOSS, Objective
from megakd.losses.targets import Evaluated
from megakd.models.elastic import Elastic
from megakd.models.knowledge import opened_head, read_knowledge
from megakd.models.predictions import predict


class ReadPass(NamedTuple):
    """A pass, what its losses read, and its share in the report of its view."""

    planned: Pass
    reading: Reading
    share: float


class StudentBundle(nn.Module):
    """The student with its objective, so that losses run inside the engine's forward.

    views: sub-networks of the student that passes may name.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        *,
        world_size: int,
        kernels: Kernels = "auto",
        views: Mapping[str, View] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.views = dict(views or {})
        self.elastic = Elastic(student) if views else None  # type: ignore[arg-type]
        self.objective = objective
        self.world_size = world_size
        self.kernels: Kernels = kernels

    def opened_head(self, batch: Batch) -> AbstractContextManager[object]:
        """Hold the student's output matrix whole around a forward without a plan."""
        return opened_head(self.student, batch)

    def forward(
        self,
        batch: Batch,
        knowledge: Mapping[str, Knowledge] | None = None,
        plan: Sequence[Pass] | None = None,
        counts: Counts | None = None,
        *,
        view: str | None = None,
    ) -> Losses | Predictions:
        """All passes of a plan on one micro-batch, or predictions where there is no plan.

        Args:
            batch: one micro-batch.
            knowledge: what each planned teacher said of it.
            plan: the passes of the step.
            counts: global unit counts of the step.
            view: whose predictions are asked for.
        """
        if plan is None or counts is None:
            with self._viewing(view):
                return predict(self.student, batch, self.kernels)
        ledger = Ledger(counts, self.objective, self.world_size)
        readings = self._read(batch, knowledge or {}, plan, ledger.per_unit)
        # Once all views of a width have run: a head then has one gradient, not one per view.
        for together in readings.values():
            with self._viewing(together[0].planned.view):
                evaluated = self.objective([read.reading for read in together])
            for read, one in zip(together, evaluated, strict=True):
                ledger.add(read.planned, one, share=read.share)
        return ledger.losses()

    def _read(
        self,
        batch: Batch,
        knowledge: Mapping[str, Knowledge],
        plan: Sequence[Pass],
        per_unit: Mapping[Unit, Tensor],
    ) -> dict[int | None, list[ReadPass]]:
        """One forward of every view that is planned; its passes, by the width of the view."""
        by_view: dict[str | None, list[Pass]] = {}
        for planned in plan:
            by_view.setdefault(planned.view, []).append(planned)
        found: dict[int | None, list[ReadPass]] = {}
        with self._sharing(len(by_view) > 1):
            for name, passes in by_view.items():
                with self._viewing(name):
                    said = read_knowledge(self.student, batch, self.objective.needs)
                width = self.views[name].width if name in self.views else None
                found.setdefault(width, []).extend(
                    ReadPass(
                        planned,
                        self._reading(batch, said, knowledge, planned, per_unit),
                        1 / len(passes),
                    )
                    for planned in passes
                )
        return found

    def _reading(
        self,
        batch: Batch,
        said: Knowledge,
        knowledge: Mapping[str, Knowledge],
        planned: Pass,
        per_unit: Mapping[Unit, Tensor],
    ) -> Reading:
        chosen = dict(planned.weights or {})
        reading = Reading(
            student=said,
            teacher=knowledge.get(planned.teacher) if planned.teacher else None,
            batch=batch,
            weights=self.objective.weights | chosen,
            per_unit=per_unit,
            kernels=self.kernels,
            scale=planned.scale,
        )
        if planned.weigh is not None:
            factors = planned.weigh(reading)
            chosen = {name: reading.weights[name] * factor for name, factor in factors.items()}
        left_out = frozenset(name for name, weight in chosen.items() if weight == 0)
        return replace(reading, weights={**reading.weights, **chosen}, left_out=left_out)

    def _viewing(self, view: str | None) -> AbstractContextManager[None]:
        if self.elastic is None:
            return nullcontext()
        return self.elastic.viewing(None if view is None else self.views[view])

    def _sharing(self, several: bool) -> AbstractContextManager[None]:  # noqa: FBT001
        """Embeddings are looked up once for all views: their gradient is as large as the table."""
        if self.elastic is None or not several:
            return nullcontext()
        return self.elastic.sharing_embeddings()


class Ledger:
    """Adds up the passes of a micro-batch.

    counts: global unit counts of the step.
    """

    def __init__(self, counts: Counts, objective: Objective, world_size: int) -> None:
        self.per_unit = unit_weights(counts, world_size)
        self._counts, self._units, self._world_size = counts, objective.units, world_size
        self._total = torch.zeros((), device=next(iter(counts.values())).device)
        self._parts: dict[str, Tensor] = {}

    def add(self, planned: Pass, evaluated: Evaluated, *, share: float) -> None:
        """Takes one pass; its terms are reported as a mean over the passes of its view."""
        self._total = self._total + evaluated.total
        prefix = f"{planned.view}/" if planned.view else ""
        for name, value in evaluated.sums.items():
            count = self._counts[self._units[name]].clamp(min=1)
            known = self._parts.get(prefix + name, 0.0)
            self._parts[prefix + name] = known + share * value.float() / count

    def losses(self) -> Losses:
        """The loss to minimise, and what the report says of it."""
        minimised = {WEIGHTED_LOSS: self._total.detach() / self._world_size}
        return Losses(self._total, self._parts | minimised)
