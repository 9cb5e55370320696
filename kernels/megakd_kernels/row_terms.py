"""Row values, collected chunk by chunk, and the choice of the row kernel.

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
from megakd_kernels.row_plan import (
    NO_BIASES,
    Biases,
    RowInputs,
    RowKernel,
    RowPlan,
    Scratch,
)
from megakd_kernels.settings import runs_kernels, weigh


class RowValues(NamedTuple):
    """Values of a loss.

    total: scalar, sum over rows of kd_factor * mixture . divergences + ce_factor * ce; the
        formed gradients are gradients of this total.
    divergences: [n_div, N], with value_scale, without weights.
    ce, agrees: [N].
    """

    total: Tensor
    divergences: Tensor
    ce: Tensor
    agrees: Tensor

    def spread(self, kept: Tensor, count: int) -> RowValues:
        """Return the values with the kept rows at their places among `count` rows."""
        rows = (spread(value, kept, count) for value in self[1:])
        return RowValues(self.total, *rows)


@dataclass(frozen=True, kw_only=True)
class RowFactors:
    """Validity, label and loss factors per row; each [N]."""

    valid: Tensor
    labels: Tensor | None
    kd: Tensor
    ce: Tensor

    def rows(self, index: Tensor) -> RowFactors:
        """Return the factors of a subset of the rows."""
        labels = None if self.labels is None else self.labels[index]
        return RowFactors(
            valid=self.valid[index], labels=labels, kd=self.kd[index], ce=self.ce[index]
        )

    def values(
        self, weights: Sequence[float], divergences: Tensor, ce: Tensor, agrees: Tensor
    ) -> RowValues:
        """Return the values with their total, without infinite values whose factor is 0."""
        total = weigh(ce, self.ce).sum()
        for weight, value in zip(weights, divergences, strict=True):
            if weight != 0:
                total = total + weight * weigh(value, self.kd).sum()
        return RowValues(total, divergences, ce, agrees)

    def inputs(self, part: slice, slope: float) -> RowInputs:
        """Return the inputs of a row kernel; slope = value_scale / temperature."""
        labels = None if self.labels is None else self.labels[part]
        return RowInputs(self.valid[part], labels, self.kd[part] * slope, self.ce[part])


class RowScorer:
    """Runs a row kernel over chunks of logits and keeps the values."""

    def __init__(self, kernel: RowKernel, plan: RowPlan, factors: RowFactors, block: int) -> None:
        self._kernel, self._plan, self._factors, self._block = kernel, plan, factors, block
        self._divergences = factors.kd.new_zeros(len(plan.mixture), len(factors.kd))
        self._ce, self._agrees = torch.zeros_like(factors.kd), torch.zeros_like(factors.kd)

    def run_(
        self, rows: slice, student: Tensor, teacher: Tensor | None, gradient: Tensor | None
    ) -> None:
        """Score the rows `rows`, whose logits are [C, V]; see `RowKernel.run_`."""
        slope = self._plan.value_scale / self._plan.temperature
        for part, here in row_blocks(rows, self._block):
            logits, formed = block_of(student, gradient, part)
            soft = None if teacher is None else teacher[part]
            inputs = self._factors.inputs(here, slope)
            terms = self._kernel.run_(logits, soft, inputs, formed)
            self._divergences[:, here] = terms.divergences
            self._ce[here], self._agrees[here] = terms.ce, terms.agrees

    def values(self) -> RowValues:
        """Return the values of all rows and their total."""
        weights = [weight for _, weight in self._plan.mixture]
        return self._factors.values(weights, self._divergences, self._ce, self._agrees)


def row_blocks(rows: slice, block: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of the rows of a chunk, as slices within the chunk and within all rows."""
    for part in slices(rows.stop - rows.start, block):
        yield part, slice(rows.start + part.start, rows.start + part.stop)


def block_of(logits: Tensor, gradient: Tensor | None, part: slice) -> tuple[Tensor, Tensor | None]:
    """Return some rows of the logits and of their gradient.

    Both are the same tensor if the gradient overwrites the logits.
    """
    block = logits[part]
    if gradient is None:
        return block, None
    return block, block if gradient is logits else gradient[part]


def spread(values: Tensor, kept: Tensor, count: int) -> Tensor:
    """Place values [..., n] of the kept rows among `count` rows; other rows are zeros."""
    return values.new_zeros(*values.shape[:-1], count).index_copy_(-1, kept, values)


def row_kernel(
    implementation: str, plan: RowPlan, *, block: int, like: Tensor, biases: Biases = NO_BIASES
) -> RowKernel:
    """Return the row kernel of this code path, for blocks of at most `block` rows.

    biases: for Triton, which adds them to the logits.
    """
    if runs_kernels(implementation, like.dtype):
        # Imported here because the package also works without Triton.
        from megakd_kernels.triton.row_kd import TritonRows

        return TritonRows(plan=plan, biases=biases)
    return RowLosses(plan=plan, scratch=Scratch(block, like))
