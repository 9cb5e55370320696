"""Conversion of options to row factors, and of row values to a `KDOutput`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd_kernels.inputs import Rows
from megakd_kernels.row_plan import Warp
from megakd_kernels.row_terms import RowFactors, RowValues
from megakd_kernels.settings import (
    Implementation,
    KDOutput,
    Number,
    Objective,
    as_scalar,
    reduction_scale,
    weigh,
    weighted_total,
)


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Factors of the rows in the formed gradient, and the final scale of the gradient.

    The factors are relative to |kd_weight| + |ce_weight|, which becomes part of the final scale.
    A weight of 1e-7 (such as 1 / count) then costs a low-precision gradient no digits.

    kd_factor, ce_factor: [N]; compared: [N] bool, rows of `agreement`.
    magnitude: number, or 0-d tensor if a weight of the objective is a tensor.
    """

    objective: Objective
    rows: Rows
    kd_factor: Tensor
    ce_factor: Tensor
    compared: Tensor
    magnitude: Number

    @classmethod
    def of(cls, rows: Rows, objective: Objective, *, with_teacher: bool) -> Normalisation:
        """Compute the factors of the rows from the weights of the objective."""
        kd, ce, magnitude = _relative(objective, rows.weight, with_teacher=with_teacher)
        return cls(
            objective=objective,
            rows=rows,
            kd_factor=rows.weight * kd,
            ce_factor=rows.hard_weight * ce,
            compared=rows.valid if with_teacher else rows.labelled,
            magnitude=magnitude,
        )

    @property
    def factors(self) -> RowFactors:
        """The factors in the form that row losses take."""
        rows = self.rows
        return RowFactors(
            valid=rows.valid, labels=rows.labels, kd=self.kd_factor, ce=self.ce_factor
        )

    def output(self, values: RowValues) -> KDOutput:
        """Return the result; the loss is [N] for the reduction "none"."""
        rows, objective = self.rows, self.objective
        divergences, ce = values.divergences.detach(), values.ce.detach()
        divergences = weigh(divergences, rows.weight)
        ce = weigh(ce, rows.hard_weight) if objective.wants_ce else ce
        count = rows.valid.sum()
        if objective.reduction == "none":
            loss = weighted_total(objective, divergences, ce)
        else:
            loss = values.total * (reduction_scale(objective, count, ce) * self.magnitude)
        return KDOutput.of(loss, divergences, ce, values.agrees * self.compared, count)


def _relative(
    objective: Objective, like: Tensor, *, with_teacher: bool
) -> tuple[Number, Number, Number]:
    """Return both weights divided by the sum of their magnitudes, and the sum (1 if it is 0)."""
    kd: Number = objective.kd_weight if with_teacher else 0.0
    ce = objective.ce_weight
    if isinstance(kd, Tensor) or isinstance(ce, Tensor):
        kd, ce = as_scalar(kd, like), as_scalar(ce, like)
        magnitude = kd.abs() + ce.abs()
        magnitude = torch.where(magnitude > 0, magnitude, 1)
        return kd / magnitude, ce / magnitude, magnitude
    # Numbers need no tensors, whose operations would take longer than a small loss.
    total = abs(kd) + abs(ce)
    return kd / (total or 1.0), ce / (total or 1.0), total or 1.0


def operator_options(
    objective: Objective, shared: int, warps: tuple[Warp, Warp], implementation: Implementation
) -> tuple[object, ...]:
    """Return the options as flat operator arguments, in the order of `ops.FlatPlan`."""
    student, teacher = warps
    return (
        ",".join(name for name, _ in objective.mixture),
        [weight for _, weight in objective.mixture],
        [
            objective.beta, objective.skew, objective.temperature, objective.value_scale,
            *student, *teacher,
        ],
        shared,
        objective.wants_ce,
        implementation,
        objective.chunk_mb or 0.0,
    )  # fmt: skip
