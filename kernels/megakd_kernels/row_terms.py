"""From blocks of logits to a `KDOutput`: runs the row losses, keeps their values, sums them up.

Shapes: N rows, C rows of a chunk, V vocabulary or classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megakd_kernels.chunking import slices
from megakd_kernels.row_losses import (
    RowInputs,
    RowPlan,
    RowTerms,
    Scratch,
    rows_with_teacher_,
    rows_without_teacher_,
)
from megakd_kernels.settings import (
    KDOutput,
    Objective,
    Rows,
    as_scalar,
    reduction_scale,
    weighted_total,
)


class RowTotals:
    """Values of all N rows, and the factors by which rows enter the formed gradient.

    The factors are relative to |kd_weight| + |ce_weight|, which goes into the final scale:
    a weight of 1e-7 (one over a count, say) then costs a low-precision gradient no digits.
    """

    def __init__(self, rows: Rows, objective: Objective, *, with_teacher: bool) -> None:
        self.rows = rows
        self.objective = objective
        weight = rows.weight
        kinds = len(objective.mixture) if with_teacher else 0
        self._divergences = weight.new_zeros(kinds, len(weight))
        self._ce = torch.zeros_like(weight)
        self._agrees = torch.zeros_like(rows.valid)
        kd = as_scalar(objective.kd_weight if kinds else 0.0, weight)
        ce = as_scalar(objective.ce_weight, weight)
        magnitude = kd.abs() + ce.abs()
        self._magnitude = torch.where(magnitude > 0, magnitude, 1)
        slope = objective.value_scale / objective.temperature
        self.kd_factor = weight * (kd / self._magnitude * slope)
        hard = torch.zeros_like(weight) if rows.hard_weight is None else rows.hard_weight
        self._hard_weight = hard
        self.ce_factor = hard * (ce / self._magnitude)

    def inputs(self, part: slice) -> RowInputs:
        """Labels and gradient factors of some rows."""
        labels = None if self.rows.labels is None else self.rows.labels[part]
        return RowInputs(labels, self.kd_factor[part], self.ce_factor[part])

    def store(self, part: slice, terms: RowTerms) -> None:
        """Keeps the values of some rows; an infinite value of a row that is out is dropped."""
        weight, hard = self.rows.weight[part], self._hard_weight[part]
        self._divergences[:, part] = torch.where(weight != 0, terms.divergences * weight, 0)
        self._ce[part] = torch.where(hard != 0, terms.ce * hard, 0)
        self._agrees[part] = terms.agrees & self.rows.valid[part]

    def output(self) -> tuple[KDOutput, Tensor]:
        """The result without its graph, and the scale of the formed gradients."""
        n_valid = self.rows.valid.sum()
        sums, ce_sum = self._divergences.sum(1), self._ce.sum()
        scale = reduction_scale(self.objective, n_valid, ce_sum)
        if self.objective.reduction == "none":
            loss = weighted_total(self.objective, self._divergences, self._ce)
        else:
            loss = weighted_total(self.objective, sums, ce_sum) * scale
        output = KDOutput(loss, sums, ce_sum, n_valid, self._agrees.sum())
        return output, scale * self._magnitude


class TermRows:
    """Runs the row losses over chunks of logits, block by block."""

    def __init__(
        self, totals: RowTotals, *, shared: int, block: int, like: Tensor, with_gradient: bool
    ) -> None:
        objective = totals.objective
        self._totals = totals
        self._block = block
        self._scratch = Scratch(block, like)
        self._plan = RowPlan(
            mixture=objective.mixture,
            beta=objective.beta,
            temperature=objective.temperature,
            value_scale=objective.value_scale,
            shared=shared,
            with_ce=objective.wants_ce,
            with_gradient=with_gradient,
        )

    def run_(self, chunk: slice, student: Tensor, teacher: Tensor | None = None) -> None:
        """Stores the values of the rows `chunk`; their logits [C, V] become gradients."""
        for part in slices(len(student), self._block):
            rows = slice(chunk.start + part.start, chunk.start + part.stop)
            inputs = self._totals.inputs(rows)
            if teacher is None:
                terms = rows_without_teacher_(student[part], inputs, self._plan)
            else:
                terms = rows_with_teacher_(
                    student[part], teacher[part], inputs, self._plan, self._scratch
                )
            self._totals.store(rows, terms)
