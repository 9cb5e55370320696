"""Differences between the FSP matrices ("flows" between two layers) of two models.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megakd.contract.tasks import Kernels
from megakd_kernels.formed import refuse_second_derivative

MATRIX_ELEMENTS = 1 << 24
"""Maximum number of elements of the [D, D] matrices in memory; one row's matrix may be larger."""


def flow_errors(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    valid: Tensor,
    projections: Sequence[Tensor] | None = None,
    kernels: Kernels = "auto",
) -> list[Tensor]:
    """Return squared errors between FSP matrices G = F^T F' / n (Yim et al. 2017, equation 1).

    Each layer and the next layer form one flow; n is the number of valid positions of a row. The
    matrices of all rows are never in memory at once, and no matrix is kept for the backward: the
    gradients with respect to the states are computed in the forward.

    Args:
        student: states of the student's mapped layers, at least two, each [B, T, S].
        teacher: states of the teacher's mapped layers, as many as the student's, each [B, T, D];
            they carry no gradient.
        valid: [B, T] bool; states at other positions may hold any values.
        projections: [D, S] for each of the student's states; None if both widths are equal.
        kernels: `reference` forms all matrices and leaves the gradient to autograd.

    Returns:
        One scalar per flow, fp32 (fp64 if an input is fp64): per row the mean over the [D, D]
        entries of the squared difference, summed over the rows.

    Raises:
        RuntimeError: a second derivative is requested and `kernels` is not `reference`.
    """
    # A state is cast once for the two flows that use it, so its gradients are added in fp32.
    ours, theirs = ([counted(state, valid) for state in states] for states in (student, teacher))
    if projections is not None:
        ours = [
            functional.linear(state, weight.to(state.dtype))
            for state, weight in zip(ours, projections, strict=True)
        ]
    lengths = valid.sum(1).clamp(min=1)
    return [
        _flow_error((*mine, *other), lengths, kernels)
        for mine, other in zip(pairwise(ours), pairwise(theirs), strict=True)
    ]


def _flow_error(states: Sequence[Tensor], lengths: Tensor, kernels: Kernels) -> Tensor:
    if kernels == "reference":
        return _apart(states, lengths).square().mean((1, 2)).sum()
    return _FlowError.apply(*states, lengths)  # pyright: ignore[reportReturnType]


def counted(state: Tensor, valid: Tensor) -> Tensor:
    """Return [B, T, D] in at least fp32, zero where not valid: NaN times a zero slope is NaN."""
    wide = state if state.dtype == torch.float64 else state.float()
    return wide.masked_fill(~valid[..., None], 0)


def _apart(states: Sequence[Tensor], lengths: Tensor) -> Tensor:
    """Return [B, D, D]: the student's matrices minus the teacher's."""
    first, second, their_first, their_second = states
    return (first.mT @ second - their_first.mT @ their_second) / lengths[:, None, None]


class _FlowError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        *states, lengths = inputs
        first, second = states[:2]
        slopes = [torch.empty_like(first), torch.empty_like(second)]
        total = first.new_zeros(())
        entries = first.shape[-1] ** 2
        together = max(1, MATRIX_ELEMENTS // entries)
        for start in range(0, len(first), together):
            part = slice(start, start + together)
            apart = _apart([state[part] for state in states], lengths[part])  # [b, D, D]
            total = total + apart.square().sum() / entries
            slope = apart * (2 / entries) / lengths[part, None, None]
            slopes[0][part] = second[part] @ slope.mT
            slopes[1][part] = first[part] @ slope
        ctx.save_for_backward(*slopes)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        first, second = ctx.saved_tensors
        return first * upstream, second * upstream, None, None, None
