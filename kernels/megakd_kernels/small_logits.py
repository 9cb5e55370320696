"""Forward KL and cross-entropy of few logits on a CPU, in about as many operations as eager torch.

The number of operations decides how long a small loss takes. This module therefore forms only the
loss and its gradient, and defers the statistics of the output. It takes the common case and leaves
every other case to the general code.
Shapes: N rows, V ids of the student, S ids that both models have.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd_kernels.deferred import DeferredOutput, Statistics
from megakd_kernels.formed import is_watched, refuse_second_derivative
from megakd_kernels.inputs import Rows, compute_dtype, needs_gradient
from megakd_kernels.reference import is_right, share_a_maximum
from megakd_kernels.settings import KDOutput, Objective

# Numbers in the logits of both models up to which this module is faster than an operator.
MOST_NUMBERS = 1 << 17
# Largest q/p - 1. Above it, p may be too small for its dtype although q is not.
_LARGEST_EXCESS = 1e17


class _Term(NamedTuple):
    """A term of the loss.

    values: [N], or summands [N, S] of these values.
    gradient: [N, V] or [N, S], of the sum of the values, not yet multiplied by `slope`.
    weight, slope: factors of the values and of the gradient in the loss.
    """

    values: Tensor
    gradient: Tensor
    weight: float
    slope: float


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
    own = student.detach()
    logits = _copies(own, teacher, shared)
    kd = None if teacher is None else _forward_kl(logits, objective)
    ce = None
    if rows is not None and rows.labels is not None and objective.wants_ce:
        ce = _cross_entropy(own.to(logits.dtype), rows.labels, float(objective.ce_weight))
    loss = _reduced(student, _joined(kd, ce, own), objective)
    if loss is None:
        return None
    # The statistics keep the values of the terms, but not the gradients.
    form = functools.partial(
        _statistics, logits, rows, kd and kd.values, ce and ce.values, objective.value_scale
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


def _copies(student: Tensor, teacher: Tensor | None, shared: int) -> Tensor:
    """Return the logits in the dtype of the computation: [2, N, S], or [N, V] without a teacher.

    The statistics come from these copies, because the caller may change the logits in place.
    """
    if teacher is None:
        return student.to(compute_dtype(student), copy=True)
    models = [each if each.shape[1] == shared else each[:, :shared] for each in (student, teacher)]
    logits = torch.stack(models)
    return logits.to(compute_dtype(logits))


def _forward_kl(logits: Tensor, objective: Objective) -> _Term:
    """Return KL(p || q) as the sum of p (q/p - 1 - log q/p), which has no negative term.

    The sum of q - p over the ids is 0. Without it, an error that all log q/p of a row share would
    count in full, and close models would lose their digits. The gradient is q - p = p (q/p - 1).
    Values are NaN if p may be too small for its dtype.
    """
    temperature, (_, weight) = objective.temperature, objective.mixture[0]
    scaled = logits if temperature == 1 else logits / temperature
    log_q, log_p = scaled.log_softmax(-1).unbind(0)
    p, log_ratio = log_p.exp(), log_q.sub_(log_p)
    excess = log_ratio.expm1()
    is_safe = excess.max().item() < _LARGEST_EXCESS
    gradient = p * excess
    values = excess.sub_(log_ratio).mul_(p if is_safe else math.nan)
    weight *= float(objective.kd_weight) * objective.value_scale
    return _Term(values, gradient, weight, weight / temperature)


def _cross_entropy(logits: Tensor, labels: Tensor, weight: float) -> _Term:
    """Return -log q(label) of all ids [N, V], and its gradient q - 1 at the label, q elsewhere."""
    log_q, index = logits.log_softmax(-1), labels[:, None]
    target = log_q.gather(1, index)
    gradient = log_q.exp_().scatter_(1, index, target.expm1())
    return _Term(-target.squeeze(1), gradient, weight, weight)


def _joined(kd: _Term | None, ce: _Term | None, student: Tensor) -> _Term:
    """Return the sum of the terms; ids above S have no gradient from the divergence."""
    terms = [term for term in (kd, ce) if term is not None]
    if len(terms) == 1 and terms[0].gradient.shape == student.shape:
        return terms[0]
    gradient = terms[0].gradient.new_zeros(student.shape)
    for term in terms:
        gradient[:, : term.gradient.shape[1]].add_(term.gradient, alpha=term.slope)
    total = torch.stack([term.values.sum() * term.weight for term in terms])
    return _Term(total, gradient, 1.0, 1.0)


def _reduced(student: Tensor, term: _Term, objective: Objective) -> Tensor | None:
    """Return the loss with its gradient; None if it is infinite or NaN."""
    total = term.values.sum().item() * term.weight
    if not math.isfinite(total):
        return None
    scale = 1.0
    if objective.reduction == "mean":
        scale = 1 / len(student)
    elif objective.num_items is not None:
        scale = 1 / float(objective.num_items)
    if needs_gradient(student):
        return _Loss.apply(student, term.gradient, term.slope * scale, total * scale)
    return term.values.new_full((), total * scale)


class _Loss(torch.autograd.Function):
    """A loss whose gradient was formed with its value."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, gradient: Tensor, slope: float, value: float) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.slope, ctx.dtype = slope, student.dtype
        return gradient.new_full((), value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return (gradient * (upstream * ctx.slope)).to(ctx.dtype), None, None, None


def _statistics(
    logits: Tensor, rows: Rows | None, kd: Tensor | None, ce: Tensor | None, value_scale: float
) -> Statistics:
    """Return the statistics of the output from the copies of the logits and the values."""
    count = logits.shape[-2]
    divergences = logits.new_zeros(0, count)
    if kd is not None:
        divergences = (kd.sum(-1) * value_scale).unsqueeze(0)
    if kd is None and rows is not None:
        agrees = is_right(logits, rows)
    else:
        agrees = share_a_maximum(*logits.unbind(0))
    ce = logits.new_zeros(count) if ce is None else ce
    return divergences, ce, agrees, logits.new_full((), count, dtype=torch.int64)
