"""Values of all rows as the chunks go by, and the row kernel that computes them.

Shapes: N rows, C rows of a chunk, V vocabulary or classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.chunking import slices
from megakd_kernels.row_losses import RowLosses
from megakd_kernels.row_plan import Reduce, RowInputs, RowKernel, RowPlan, RowTerms, Scratch


class RowValues(NamedTuple):
    """What a loss came to.

    total: scalar, sum over rows of kd_factor * mixture . divergences + ce_factor * ce; it is
        what the formed gradients are the gradients of.
    divergences: [n_div, N], value_scale included, without weights.
    ce: [N]. agrees: [N] bool.
    """

    total: Tensor
    divergences: Tensor
    ce: Tensor
    agrees: Tensor


@dataclass(frozen=True, kw_only=True)
class RowFactors:
    """Per row: whether it counts, its label, and the factors of its losses; each [N]."""

    valid: Tensor
    labels: Tensor | None
    kd: Tensor
    ce: Tensor

    def rows(self, index: Tensor) -> RowFactors:
        """The same for some of the rows."""
        labels = None if self.labels is None else self.labels[index]
        return RowFactors(
            valid=self.valid[index], labels=labels, kd=self.kd[index], ce=self.ce[index]
        )

    def inputs(self, part: slice, slope: float) -> RowInputs:
        """What a row kernel is given; slope = value_scale / temperature."""
        labels = None if self.labels is None else self.labels[part]
        return RowInputs(self.valid[part], labels, self.kd[part] * slope, self.ce[part])


class RowScorer:
    """Runs a row kernel over chunks of logits and keeps the values."""

    def __init__(self, kernel: RowKernel, plan: RowPlan, factors: RowFactors, block: int) -> None:
        self._kernel, self._plan, self._factors, self._block = kernel, plan, factors, block
        count, like = len(factors.valid), factors.kd
        self._divergences = like.new_zeros(len(plan.mixture), count)
        self._ce = torch.zeros_like(like)
        self._agrees = torch.zeros_like(factors.valid)

    def run_(
        self, rows: slice, student: Tensor, teacher: Tensor | None, gradient: Tensor | None
    ) -> None:
        """Scores the rows `rows`, whose logits are [C, V]; see `RowKernel.run_`."""
        slope = self._plan.value_scale / self._plan.temperature
        for part in slices(len(student), self._block):
            here = slice(rows.start + part.start, rows.start + part.stop)
            logits = student[part]
            formed = None
            if gradient is not None:
                formed = logits if gradient is student else gradient[part]
            soft = None if teacher is None else teacher[part]
            terms = self._kernel.run_(logits, soft, self._factors.inputs(here, slope), formed)
            self._store(here, terms)

    def _store(self, rows: slice, terms: RowTerms) -> None:
        self._divergences[:, rows] = terms.divergences
        self._ce[rows] = terms.ce
        self._agrees[rows] = terms.agrees

    def values(self) -> RowValues:
        """The values of all rows, and their total."""
        kd, ce = self._factors.kd, self._factors.ce
        # An infinite value of a row that is out must not become NaN.
        total = torch.where(ce != 0, self._ce * ce, 0).sum()
        for (_, weight), value in zip(self._plan.mixture, self._divergences, strict=True):
            total = total + weight * torch.where(kd != 0, value * kd, 0).sum()
        return RowValues(total, self._divergences, self._ce, self._agrees)


def row_kernel(
    implementation: str, plan: RowPlan, reduce: Reduce, *, block: int, like: Tensor
) -> RowKernel:
    """The row mathematics of this code path, for blocks of at most `block` rows."""
    if implementation == "triton":
        # Late: the package works where Triton is not installed.
        from megakd_kernels.triton.row_kd import TritonRows

        return TritonRows(plan=plan, reduce=reduce)
    return RowLosses(plan=plan, scratch=Scratch(block, like), reduce=reduce)
