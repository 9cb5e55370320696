"""The module a student engine owns: the student and everything differentiable beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import megakd_kernels
from megakd.config import Kernels
from megakd.knowledge import Needs, read_knowledge
from megakd.losses import Reading
from megakd.objective import WEIGHTED_LOSS, Objective, unit_weights
from megakd.stage import IGNORE, UNITS, Batch, Knowledge, Losses, Pass, Predictions


class StudentBundle(nn.Module):
    """The student with its objective, so that losses run inside the engine's forward."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        *,
        world_size: int,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.world_size = world_size
        self.kernels: Kernels = kernels

    def forward(
        self,
        batch: Batch,
        knowledge: Mapping[str, Knowledge] | None = None,
        plan: Sequence[Pass] | None = None,
        counts: Tensor | None = None,
    ) -> Losses | Predictions:
        """All passes of a plan on one micro-batch, or predictions where there is no plan.

        Args:
            batch: one micro-batch.
            knowledge: what each planned teacher said of it.
            plan: the passes of the step.
            counts: [3] global unit counts of the step, in the order of `UNITS`.
        """
        if plan is None or counts is None:
            return predict(self.student, batch, self.kernels)
        scale = unit_weights(counts, self.world_size)
        read = read_knowledge(self.student, batch, self.objective.needs)
        total = torch.zeros((), device=counts.device)
        parts: dict[str, Tensor] = {}
        passes = Counter(planned.view for planned in plan)
        for planned in plan:
            teacher = (knowledge or {}).get(planned.teacher) if planned.teacher else None
            weights = self.objective.weights | dict(planned.weights or {})
            reading = Reading(read, teacher, batch, weights, scale, self.kernels)
            evaluated = self.objective(reading)
            total = total + planned.scale * evaluated.total
            prefix = f"{planned.view}/" if planned.view else ""
            for name, value in evaluated.sums.items():
                part = value.float() / counts[UNITS.index(self.objective.units[name])].clamp(min=1)
                parts[prefix + name] = parts.get(prefix + name, 0.0) + part / passes[planned.view]
        parts[WEIGHTED_LOSS] = total.detach() / self.world_size
        return Losses(total, parts)


def predict(model: nn.Module, batch: Batch, kernels: Kernels = "auto") -> Predictions:
    """Logits or scores of a micro-batch; of a language model the sums its metrics need."""
    read = read_knowledge(model, batch, Needs())
    if read.logits is not None:
        return Predictions(outputs=read.logits.float(), sums=None)
    if read.head is None or read.hidden is None:
        raise TypeError("a language model was read without its head")
    weight, bias = read.head.read()
    stats = megakd_kernels.linear_stats(
        read.hidden,
        weight,
        labels=batch.target_labels,
        ignore_index=IGNORE,
        student_bias=bias,
        impl=kernels,
    )
    sums = torch.stack([stats.ce_sum.double(), stats.agreement.double(), stats.n_valid.double()])
    return Predictions(outputs=None, sums=sums)
