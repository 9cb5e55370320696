"""Forward KL and cross-entropy of few logits on a CPU, in about as many operations as eager torch.

The number of operations decides how long a small loss takes. This module therefore forms only the
loss and its gradient, and defers the statistics of the output. It takes the common case and leaves
every other case to the general code.
Shapes: N rows, V ids of the student, S ids that both models have.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd_kernels.deferred import DeferredOutput, Statistics
from megakd_kernels.formed import is_watched, refuse_second_derivative
from megakd_kernels.inputs import Rows, compute_dtype, needs_gradient
from megakd_kernels.reference import is_right, share_a_maximum
from megakd_kernels.settings import KDOutput, Objective

# Numbers in the logits of both models up to which this module is faster than an operator.
MOST_NUMBERS = 1 << 17
# KL(p || q) of a row below which the rounding error of the sum p log p/q in fp32, about 1e-7,
# counts. Errors of the rows are independent, so their sum grows with the root of their number.
_CLOSE = 0.1
# Largest q/p - 1. Above it, p may be too small for its dtype although q is not.
_LARGEST_EXCESS = 1e17
_LOG2_E = math.log2(math.e)
# Numbers from which exp2 is faster than exp.
_MANY = 2048


class _Term(NamedTuple):
    """A term of the loss.

    total: part of the loss.
    rows: returns the values [N] of the term, without its weight.
    gradient: [N, V] or [N, S], of the part of the loss.
    """

    total: float
    rows: Callable[[], Tensor]
    gradient: Tensor


def kd_loss(
    student: Tensor, teacher: Tensor | None, rows: Rows | None, objective: Objective, shared: int
) -> KDOutput | None:
    """Return the loss of logits on a CPU, or None if the case is not the common one.

    The common case: forward KL, cross-entropy or both; all rows count; numbers as weights; a
    reduced loss; a finite result.

    Args:
        student: [N, V] logits.
        teacher: [N, >= S] logits, or None for only cross-entropy.
        rows: rows that count, without token weights; None if all rows count and no row has a
            label.
        objective: options of the loss.
        shared: S.
    """
    if student.numel() == 0 or is_watched() or not _is_common(teacher, rows, objective):
        return None
    detached, scale = student.detach(), _scale(student, objective)
    logits = _copies(detached, teacher, shared)
    kd = None if teacher is None else _forward_kl(logits, objective, scale)
    ce = None
    if rows is not None and rows.labels is not None and objective.wants_ce:
        weight = float(objective.ce_weight) * scale
        ce = _cross_entropy(detached.to(logits.dtype), rows.labels, weight)
    term = kd if ce is None else _sum(kd, ce)
    loss = None if term is None else _loss(student, term)
    if loss is None:
        return None
    # The statistics do not keep the gradients.
    form = functools.partial(
        _statistics, logits, rows, kd and kd.rows, ce and ce.rows, objective.value_scale
    )
    return DeferredOutput.of_loss(loss, form)


def _is_common(teacher: Tensor | None, rows: Rows | None, objective: Objective) -> bool:
    if isinstance(objective.kd_weight, Tensor) or isinstance(objective.ce_weight, Tensor):
        return False
    if objective.reduction == "none" or isinstance(objective.num_items, Tensor):
        return False
    mixture = objective.mixture
    if teacher is not None and (len(mixture) != 1 or mixture[0][0] != "forward_kl"):
        return False
    if rows is None:
        return True
    has_labels = not objective.wants_ce or bool(rows.hard_weight.all())
    return has_labels and bool(rows.valid.all())


def _scale(student: Tensor, objective: Objective) -> float:
    """Return the factor of the reduction, from the sum over the rows to the loss."""
    if objective.reduction == "mean":
        return 1 / student.shape[0]
    return 1.0 if objective.num_items is None else 1 / float(objective.num_items)


def _copies(student: Tensor, teacher: Tensor | None, shared: int) -> Tensor:
    """Return the logits in the dtype of the computation: [2, N, S], or [N, V] without a teacher.

    The statistics come from these copies, because the caller may change the logits in place.
    """
    if teacher is None:
        return student.to(compute_dtype(student), copy=True)
    if student.shape != teacher.shape or student.shape[1] != shared:
        student, teacher = student[:, :shared], teacher[:, :shared]
    logits = torch.stack((student, teacher))
    return logits if logits.dtype in {torch.float32, torch.float64} else logits.float()


@functools.lru_cache(maxsize=64)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """Return a 0-d tensor: an operation with a Python number takes twice as long."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def _exp(values: Tensor) -> Tensor:
    """Return e^values; torch computes exp2 of many numbers in a quarter of the time of exp."""
    if values.numel() < _MANY:
        return values.exp()
    return (values * _number(_LOG2_E, values.dtype)).exp2_()


def _forward_kl(logits: Tensor, objective: Objective, scale: float) -> _Term:
    """Return KL(p || q) and its gradient q - p.

    The sum of p log p/q takes half of the time of `_row_kl`, and has too few digits if the models
    are close.
    """
    dtype, temperature = logits.dtype, objective.temperature
    weight = objective.mixture[0][1] * float(objective.kd_weight) * objective.value_scale * scale
    scaled = logits if temperature == 1 else logits / _number(temperature, dtype)
    log_q, log_p = scaled.log_softmax(-1).unbind(0)
    q, p, log_ratio = _exp(log_q), _exp(log_p), log_q - log_p
    gradient = q.sub_(p).mul_(_number(weight / temperature, dtype))
    total = -(p * log_ratio).sum().item()
    rows = functools.partial(_row_kl, log_q, p, log_ratio)
    if total < _CLOSE * math.sqrt(logits.shape[1]):
        values = rows()
        total, rows = values.sum().item(), values.detach
    return _Term(total * weight, rows, gradient)


def _row_kl(log_q: Tensor, p: Tensor, log_ratio: Tensor) -> Tensor:
    """Return KL(p || q) [N] as the sum of p (q/p - 1 - log q/p), which has no negative term.

    The sum of q - p over the ids is 0. Without it, an error that all log q/p of a row share would
    count in full, and close models would lose their digits.
    """
    excess = log_ratio.expm1()
    if not excess.max().item() < _LARGEST_EXCESS:
        # p may be too small for its dtype although q is not. e^-80 adds nothing to a sum.
        p = p.clamp_min(math.exp(-80))
        log_ratio = torch.minimum(log_ratio, log_q + 80)
        excess = log_ratio.expm1()
    return excess.sub_(log_ratio).mul_(p).sum(-1)


def _cross_entropy(logits: Tensor, labels: Tensor, weight: float) -> _Term:
    """Return -log q(label) of all ids [N, V], and its gradient q - 1 at the label, q elsewhere."""
    log_q, index = logits.log_softmax(-1), labels[:, None]
    target = log_q.gather(1, index)
    gradient = _exp(log_q).scatter_(1, index, target.expm1())
    if weight != 1:
        gradient.mul_(_number(weight, logits.dtype))
    return _Term(-target.sum().item() * weight, target.squeeze(1).neg, gradient)


def _sum(kd: _Term | None, ce: _Term) -> _Term:
    if kd is None:
        return ce
    ce.gradient[:, : kd.gradient.shape[1]].add_(kd.gradient)
    return ce._replace(total=kd.total + ce.total)


def _loss(student: Tensor, term: _Term) -> Tensor | None:
    """Return the loss with its gradient; None if it is infinite or NaN."""
    total, _, gradient = term
    if not math.isfinite(total):
        return None
    if not needs_gradient(student):
        return gradient.new_full((), total)
    # Ids above S have no gradient from the divergence.
    excluded = student.shape[1] - gradient.shape[1]
    return _apply(student, F.pad(gradient, (0, excluded)) if excluded else gradient, total)


class _Loss(torch.autograd.Function):
    """A loss whose gradient was formed with its value."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, gradient: Tensor, value: float) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return gradient.new_full((), value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        product = gradient * upstream
        return product if product.dtype == ctx.dtype else product.to(ctx.dtype), None, None


# Without the step in Python that `Function.apply` takes for transforms of functorch: `is_watched`
# has found none.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Loss).apply  # pyright: ignore[reportAttributeAccessIssue]


def _statistics(
    logits: Tensor,
    rows: Rows | None,
    kd: Callable[[], Tensor] | None,
    ce: Callable[[], Tensor] | None,
    value_scale: float,
) -> Statistics:
    """Return the statistics of the output from the copies of the logits and the terms."""
    count = logits.shape[-2]
    divergences = logits.new_zeros(0, count) if kd is None else (kd() * value_scale).unsqueeze(0)
    if kd is None and rows is not None:
        agrees = is_right(logits, rows)
    else:
        agrees = share_a_maximum(*logits.unbind(0))
    hard = logits.new_zeros(count) if ce is None else ce()
    return divergences, hard, agrees, logits.new_full((), count, dtype=torch.int64)
