"""Forward KL and cross-entropy of few logits on a CPU, in about as many operations as eager torch.

The number of operations decides how long a small loss takes. This module therefore forms only the
loss and its gradient, and defers the statistics of the output. It takes the common case and leaves
every other case to the general code.
Shapes: N rows, V ids of the student, S ids that both models have.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd_kernels.deferred import DeferredOutput
from megakd_kernels.formed import is_watched, refuse_second_derivative
from megakd_kernels.inputs import Masks, compute_dtype, needs_gradient
from megakd_kernels.reference import is_right, share_a_maximum
from megakd_kernels.settings import KDOutput, Number, Objective

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


class _Labels(NamedTuple):
    """Labels of the rows.

    ids: [N, 1] int64, 0 in rows without a label.
    known: [N, 1] bool, rows with a label; None: all rows.
    """

    ids: Tensor
    known: Tensor | None

    def copied(self) -> _Labels:
        return _Labels(self.ids.clone(), self.known)


class _Term(NamedTuple):
    """A term of the loss.

    sum: of the rows.
    rows: returns the values [N] of the term.
    weight: factor from the sum to the part of the loss.
    gradient: [N, V] or [N, S], of the part of the loss.
    """

    sum: float
    rows: Callable[[], Tensor]
    weight: float
    gradient: Tensor


def kd_loss(
    student: Tensor, teacher: Tensor | None, masks: Masks, objective: Objective, shared: int
) -> KDOutput | None:
    """Return the loss of logits on a CPU, or None if the case is not the common one.

    The common case: forward KL, cross-entropy or both; all rows count alike, with or without a
    label; a reduced loss; a finite result.

    Args:
        student: [N, V] logits.
        teacher: [N, >= S] logits, or None for only cross-entropy.
        masks: masks that the caller passed.
        objective: options of the loss.
        shared: S.
    """
    if student.numel() == 0 or is_watched() or not _is_common(teacher, objective):
        return None
    if not _keep_all(masks):
        return None
    labels = None
    if masks.labels is not None and (objective.wants_ce or masks.valid is None):
        labels = _labels(masks, masks.labels, *student.shape)
        if labels is None:
            return None
    detached, scale = student.detach(), _scale(student, objective)
    logits = _copies(detached, teacher, shared)
    kd = None if teacher is None else _forward_kl(logits, objective, scale)
    ce = None
    if labels is not None and objective.wants_ce:
        weight = float(objective.ce_weight) * scale
        ce = _cross_entropy(detached.to(logits.dtype), labels, weight)
    loss = _loss(student, [term for term in (ce, kd) if term is not None])
    if loss is None:
        return None
    # The statistics keep no gradient, and no tensor of the caller, who may change it.
    copied = labels.copied() if labels is not None and kd is None else None
    statistics = _Statistics(logits, copied, _values(kd), _values(ce), objective.value_scale)
    return DeferredOutput.of_loss(loss, statistics)


def _is_common(teacher: Tensor | None, objective: Objective) -> bool:
    mixture = objective.mixture
    if teacher is not None and (len(mixture) != 1 or mixture[0][0] != "forward_kl"):
        return False
    numbers = (objective.kd_weight, objective.ce_weight, objective.num_items)
    return objective.reduction != "none" and all(map(_is_read_at_once, numbers))


def _is_read_at_once(number: Number | None) -> bool:
    return not isinstance(number, Tensor) or number.is_cpu


def _keep_all(masks: Masks) -> bool:
    """Return whether all rows count alike, as far as labels do not decide it."""
    if masks.token_weight is not None:
        return False
    valid = masks.valid
    return valid is None or (valid.is_cpu and bool(valid.all()))


def _labels(masks: Masks, given: Tensor, count: int, ids: int) -> _Labels | None:
    """Return the labels of `count` rows, or None if the general code has to look at them."""
    is_plain = given.dtype == torch.int64 and given.is_cpu
    if not is_plain or 0 <= masks.ignore_index < ids:
        return None
    labels = given.reshape(count, 1)
    if _are_below(ids, labels):
        return _Labels(labels, None)
    # Without `valid`, only rows with a label count.
    known = labels != masks.ignore_index
    labels = labels.where(known, 0)
    return _Labels(labels, known) if masks.valid is not None and _are_below(ids, labels) else None


def _are_below(ids: int, labels: Tensor) -> bool:
    lowest, highest = labels.aminmax()
    return lowest.item() >= 0 and highest.item() < ids


def _scale(student: Tensor, objective: Objective) -> float:
    """Return the factor of the reduction, from the sum over the rows to the loss."""
    if objective.reduction == "mean":
        return 1 / student.shape[0]
    count = 1.0 if objective.num_items is None else float(objective.num_items)
    return 1 / count if count > 0 else 1.0


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
    return _Term(total, rows, weight, gradient)


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


def _cross_entropy(logits: Tensor, labels: _Labels, weight: float) -> _Term:
    """Return -log q(label) of all ids [N, V], and its gradient q - 1 at the label, q elsewhere."""
    log_q = logits.log_softmax(-1)
    target = log_q.gather(1, labels.ids)
    gradient = _exp(log_q).scatter_(1, labels.ids, target.expm1())
    if labels.known is not None:
        target = target.where(labels.known, 0.0)
        gradient = gradient.where(labels.known, 0.0)
    if weight != 1:
        gradient.mul_(_number(weight, logits.dtype))
    return _Term(-target.sum().item(), target.squeeze(1).neg, weight, gradient)


def _loss(student: Tensor, terms: Sequence[_Term]) -> Tensor | None:
    """Return the loss with its gradient; None if there is none, or if it is infinite or NaN."""
    total = sum(term.sum * term.weight for term in terms)
    if not terms or not math.isfinite(total):
        return None
    gradient = terms[0].gradient
    if not needs_gradient(student):
        return gradient.new_full((), total)
    for term in terms[1:]:
        gradient[:, : term.gradient.shape[1]].add_(term.gradient)
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


_Values = tuple[float, Callable[[], Tensor]]


def _values(term: _Term | None) -> _Values | None:
    return None if term is None else (term.sum, term.rows)


class _Statistics(NamedTuple):
    """Forms the fields of an output from the copies of the logits and the terms.

    labels: None if there is a divergence, whose rows agree where both models do.
    kd, ce: sum and values [N] of the rows.
    """

    logits: Tensor
    labels: _Labels | None
    kd: _Values | None
    ce: _Values | None
    value_scale: float

    def __call__(self, name: str) -> Tensor:
        return getattr(self, name)()

    def divergence_sums(self) -> Tensor:
        sums = [] if self.kd is None else [self.kd[0] * self.value_scale]
        return self.logits.new_tensor(sums)

    def ce_sum(self) -> Tensor:
        return self.logits.new_full((), 0.0 if self.ce is None else self.ce[0])

    def n_valid(self) -> Tensor:
        return self.logits.new_full((), self.logits.shape[-2], dtype=torch.int64)

    def agreement(self) -> Tensor:
        return self.row_agrees().sum()

    def row_divergences(self) -> Tensor:
        if self.kd is None:
            return self.logits.new_zeros(0, self.logits.shape[-2])
        return (self.kd[1]() * self.value_scale).unsqueeze(0)

    def row_ce(self) -> Tensor:
        return self.logits.new_zeros(self.logits.shape[-2]) if self.ce is None else self.ce[1]()

    def row_agrees(self) -> Tensor:
        if self.labels is None:
            return share_a_maximum(*self.logits.unbind(0))
        agrees, known = is_right(self.logits, self.labels.ids.squeeze(1)), self.labels.known
        return agrees if known is None else agrees & known.squeeze(1)
