"""Values of all rows as the chunks go by, and the row kernel that computes them.

Shapes: N rows, C rows of a chunk, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def spread(self, kept: Tensor, count: int) -> RowValues:
        """The values of the kept rows at their places among `count`."""
        rows = (spread(value, kept, count) for value in self[1:])
        return RowValues(self.total, *rows)


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

    def values(
        self, weights: Sequence[float], divergences: Tensor, ce: Tensor, agrees: Tensor
    ) -> RowValues:
        """The values with their total; an infinite one of a row that is out adds nothing."""
        total = weigh(ce, self.ce).sum()
        for weight, value in zip(weights, divergences, strict=True):
            total = total + weight * weigh(value, self.kd).sum()
        return RowValues(total, divergences, ce, agrees)

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
        for part, here in row_blocks(rows, self._block):
            logits, formed = block_of(student, gradient, part)
            soft = None if teacher is None else teacher[part]
            terms = self._kernel.run_(logits, soft, self._factors.inputs(here, slope), formed)
            self._store(here, terms)

    def _store(self, rows: slice, terms: RowTerms) -> None:
        self._divergences[:, rows] = terms.divergences
        self._ce[rows] = terms.ce
        self._agrees[rows] = terms.agrees

    def values(self) -> RowValues:
        """The values of all rows, and their total."""
        weights = [weight for _, weight in self._plan.mixture]
        return self._factors.values(weights, self._divergences, self._ce, self._agrees)


def row_blocks(rows: slice, block: int) -> Iterator[tuple[slice, slice]]:
    """The rows of a chunk, `block` at a time: where they are in the chunk, and among all."""
    for part in slices(rows.stop - rows.start, block):
        yield part, slice(rows.start + part.start, rows.start + part.stop)


def block_of(logits: Tensor, gradient: Tensor | None, part: slice) -> tuple[Tensor, Tensor | None]:
    """Some rows of logits and of where their gradient goes: the same tensor if that is there."""
    block = logits[part]
    if gradient is None:
        return block, None
    return block, block if gradient is logits else gradient[part]


def weigh(values: Tensor, weight: Tensor) -> Tensor:
    """Values * weight; an infinite value of a row that is out is dropped, a NaN weight shows."""
    return torch.where(weight != 0, values * weight, 0)


def spread(values: Tensor, kept: Tensor, count: int) -> Tensor:
    """[..., n] of the kept rows at their places among `count`, with zeros between."""
    return values.new_zeros(*values.shape[:-1], count).index_copy_(-1, kept, values)


def row_kernel(
    implementation: str, plan: RowPlan, reduce: Reduce, *, block: int, like: Tensor
) -> RowKernel:
    """The row mathematics of this code path, for blocks of at most `block` rows."""
    # The kernel computes in fp32: fp64, which is for checks, stays with torch.
    if implementation == "triton" and like.dtype == torch.float32:
        # Late: the package works where Triton is not installed.
        from megakd_kernels.triton.row_kd import TritonRows

        return TritonRows(plan=plan, reduce=reduce)
    return RowLosses(plan=plan, scratch=Scratch(block, like), reduce=reduce)
