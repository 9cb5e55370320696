"""Losses on logits that exist one chunk at a time, with gradients formed in the same pass.

For each chunk of rows: compute the student's logits, let a loss turn the logits into their
gradient, and multiply the gradient with the weight and with the hidden states.
Shapes: N rows, C rows of a chunk, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.chunking import (
    ChunkPlan,
    add_weight_gradient_,
    gradient_dtype,
    input_gradient_into,
    logits_buffer,
    masked_rows,
    project_into,
    slices,
)


class Side(NamedTuple):
    """One model: hidden [N, H], weight [V, H], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def rows(self, index: Tensor) -> Side:
        """Return the model with a subset of the rows."""
        return self._replace(hidden=self.hidden[index])

    def ids(self, count: int) -> Side:
        """Return the model with its first `count` ids; nothing is copied."""
        bias = None if self.bias is None else self.bias[:count]
        return self._replace(weight=self.weight[:count], bias=bias)


class Needed(NamedTuple):
    """Flags for the gradients that are requested."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        """True if at least one gradient is requested."""
        return self.hidden or self.weight or self.bias


# A loss of some rows: it stores their values, reads raw logits [C, V], which are lost, and writes
# their gradient [C, V] unless it is None; both may be one tensor.
ChunkLoss = Callable[[slice, Tensor, Tensor | None], None]


@dataclass(kw_only=True)
class StudentGradients:
    """Formed gradients in the compute dtype; empty if a gradient is not requested."""

    hidden: Tensor  # [N, H] or [0]
    weight: Tensor  # [V, H] or [0]
    bias: Tensor  # [V] or [0]
    has_rows: bool = False

    @classmethod
    def empty(cls, student: Side, needed: Needed, dtype: torch.dtype) -> StudentGradients:
        """Allocate the gradients; the first chunk writes the gradient of the weight."""
        like = student.hidden
        count, (ids, width) = len(like), student.weight.shape
        return cls(
            hidden=like.new_empty((count, width) if needed.hidden else 0, dtype=dtype),
            weight=like.new_empty((ids, width) if needed.weight else 0, dtype=dtype),
            bias=like.new_zeros(ids if needed.bias else 0, dtype=dtype),
        )

    def add(self, rows: slice, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add the gradient [C, used] with respect to the logits of the first `used` ids."""
        used = len(weight)
        if self.hidden.numel():
            input_gradient_into(self.hidden[rows], gradient, weight)
        if self.weight.numel():
            is_first = not self.has_rows
            add_weight_gradient_(self.weight[:used], gradient, hidden, is_first=is_first)
        if self.bias.numel():
            self.bias[:used] += gradient.sum(0, dtype=self.bias.dtype)
        self.has_rows = True

    def spread(self, kept: Tensor, count: int) -> StudentGradients:
        """Move the kept rows to their places among `count` rows; other rows are zeros."""
        if self.hidden.dim() == 2:
            rows = self.hidden.new_zeros(count, self.hidden.shape[1])
            self.hidden = rows.index_copy_(0, kept, self.hidden)
        return self

    def finish(self, used: int) -> StudentGradients:
        """Set the weight gradient to zero for ids that no row's loss reaches."""
        self.weight[used if self.has_rows else 0 :] = 0
        return self


def run_chunks(
    student: Side,
    loss: ChunkLoss,
    gradients: StudentGradients,
    *,
    valid: Tensor,
    plan: ChunkPlan,
    logits: Tensor,
) -> None:
    """Project, score and back-project all rows.

    Args:
        student: the head with the ids that the loss reads.
        loss: called for consecutive chunks.
        gradients: filled, unless all gradients are empty.
        valid: [N] bool; hidden states of other rows may hold anything.
        plan: chunk sizes.
        logits: buffer [C, V] of the student's logits.
    """
    dtype = gradients.hidden.dtype
    narrow = gradient_dtype(student.hidden, dtype)
    needs_gradient = any(g.numel() for g in (gradients.hidden, gradients.weight, gradients.bias))
    count, ids = len(student.hidden), len(student.weight)
    like = gradients.bias
    separate = None
    if needs_gradient and narrow != dtype:
        separate = logits_buffer(min(plan.group, count), ids, like, narrow)
    for group in slices(count, plan.group):
        hidden = masked_rows(student.hidden[group], valid[group], dtype)
        formed = separate
        for part in slices(len(hidden), plan.chunk):
            out = logits[: part.stop - part.start]
            project_into(out, hidden[part], student.weight, student.bias)
            formed = out if separate is None else separate
            gradient = out if separate is None else separate[part]
            rows = slice(group.start + part.start, group.start + part.stop)
            loss(rows, out, gradient if needs_gradient else None)
        if needs_gradient and formed is not None:
            gradients.add(group, formed[: len(hidden)], hidden, student.weight)
