"""A weight of the projections, measured: their gradient is a share of the cross-entropy's.

With the mean over all elements, the gradient of the projections is hundreds of times smaller than
that of the cross-entropy, and with a sum it dominates. The scale depends on the sizes of both
models, so that the first two updates measure it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override

from megakd.contract.stage import Pass, Strategy
from megakd.engine.collectives import agree, all_reduce_
from megakd.methods.mixed_vocabulary.parameter_projections import NAME, ParameterProjections

CROSS_ENTROPY = "hard_cross_entropy"
FAINT = 1e-6
"""Weight of the term that is not measured. With 0 its weights would have no gradient at all."""
MEASURED = (CROSS_ENTROPY, NAME)
"""The terms whose gradients are measured, in this order, one per update."""


class Balanced(Strategy):
    """Both models learn, and the projections weigh as much as `ratio` says.

    The first update learns from the cross-entropies, the second from the projections and the
    teacher's cross-entropy, and all others from everything. A measurement that is not finite, as
    under fp16, is repeated.

    ratio: the norm of the projections' gradient on the compared matrices of the student, divided
        by that of the student's cross-entropy.
    teacher: role of the teacher that learns beside the student.
    """

    def __init__(self, ratio: float, teacher: str) -> None:
        self.ratio, self.teacher = ratio, teacher
        self._norms: list[float] = []
        self._names: frozenset[str] = frozenset()

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"ratio": self.ratio, "teacher": self.teacher}

    @property
    def weight(self) -> float:
        """The weight of the projections' mean squared error; 1 until it is measured."""
        if len(self._norms) < len(MEASURED):
            return 1.0
        cross_entropy, projections = self._norms
        return self.ratio * cross_entropy / projections

    @override
    def begin(self, student: Any, step: int) -> None:
        compared = {
            id(matrix)
            for group in student.bundle.modules()
            if isinstance(group, ParameterProjections)
            for matrix in group.matrices
        }
        named = student.student.named_parameters()
        self._names = frozenset(name for name, weight in named if id(weight) in compared)

    @override
    def passes(self, step: int) -> tuple[Pass, ...]:
        waiting = MEASURED[len(self._norms) :]
        weights = {NAME: self.weight}
        if waiting:
            weights = {name: 1.0 if name == waiting[0] else FAINT for name in MEASURED}
        # The projections are computed once, in the student's pass.
        return (Pass(weights=weights), Pass(learner=self.teacher, weights={NAME: 0.0}))

    @override
    def before_update(self, step: int, student: Any) -> None:
        """Measure the gradient of the term whose turn it is, which is complete and not clipped."""
        if len(self._norms) == len(MEASURED):
            return
        squares = torch.zeros(1, dtype=torch.float64)
        for shard in student.local_shards():
            if shard.name in self._names:
                squares += shard.gradient.double().square().sum().cpu()
        total = all_reduce_(squares)
        norm = math.sqrt(float(total)) if torch.isfinite(total) else 0.0
        if norm > 0:
            self._norms.append(agree(norm))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms)}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._norms = list(state["norms"])

    @override
    def scalars(self) -> Mapping[str, float]:
        return {"projections/weight": self.weight}
