"""Divergences and cross-entropy of blocks of rows, with their gradients, in few passes.

Everything works in place on buffers [R, V] that stay in the cache, in plain torch.
Notation as in the public functions: q student, p teacher, both over the shared ids;
`gap` = log p - log q. For any loss f(p, q) with g = df/dq the gradient with respect to
the student's logits is q (g - sum q g) / T.

Numerics: the row maximum and log Z are kept apart (log q = (a - max) - log Z). The gap is
formed from the raw logits, whose difference is exact where they are close, and the difference
of two log Z is log1p of a quotient, so that a student close to its teacher does not drown in
the rounding of large logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOG2 = math.log(2.0)
# Stands for log(p / 0): 0 times it is 0, and a probability above 1e-30 makes it _INFINITE.
_IMPOSSIBLE = 1e38
_INFINITE = 1e8
# exp(80) is finite in fp32, and q <= exp(-80) no longer counts in a sum with 1.
_LARGEST_GAP = 80.0


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """What to compute for every row.

    mixture: (divergence, weight) pairs; shared: number of ids both models have.
    """

    mixture: tuple[tuple[str, float], ...]
    beta: float
    temperature: float
    value_scale: float
    shared: int
    with_ce: bool
    with_gradient: bool

    def shares_softmax(self, width: int) -> bool:
        """Whether cross-entropy (T = 1, every id) can use the divergences' softmax."""
        return self.temperature == 1.0 and self.shared == width


class RowInputs(NamedTuple):
    """Per row: label (int64), and the factors of the two losses' gradients; each [R]."""

    labels: Tensor | None
    kd_factor: Tensor
    ce_factor: Tensor


class RowTerms(NamedTuple):
    """Values per row: divergences [n_div, R], cross-entropy [R], agreement [R] bool."""

    divergences: Tensor
    ce: Tensor
    agrees: Tensor


class Scratch:
    """Buffers of the block size by name, made at first use and then reused."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self._rows = rows
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """An uninitialised buffer [rows <= block, V]."""
        rows, width = shape
        if name not in self._buffers:
            self._buffers[name] = self._like.new_empty(self._rows, width)
        return self._buffers[name][:rows]


@dataclass
class _Block:
    """The softmaxes of one block, and the gradient as it is put together.

    The gradient is q_exp * (constant + gap_slope * gap + mix_slope * mix) - teacher * p_exp.
    """

    q_exp: Tensor  # [R, V], not yet divided by q_sum
    q_sum: Tensor  # [R, 1]
    p_exp: Tensor
    p_sum: Tensor
    gap: Tensor  # [R, V] log p - log q
    mix: Tensor | None  # [R, V] log m - log q, for jsd
    product: Tensor  # [R, V] free for products
    constant: Tensor  # [R, 1], like the other factors
    gap_slope: Tensor | None = None
    mix_slope: Tensor | None = None
    teacher: Tensor | None = None

    def student_mean(self, values: Tensor) -> Tensor:
        """The sum of q * values, [R, 1]."""
        return torch.mul(self.q_exp, values, out=self.product).sum(-1, keepdim=True) / self.q_sum

    def teacher_mean(self, values: Tensor) -> Tensor:
        """The sum of p * values, [R, 1]."""
        return torch.mul(self.p_exp, values, out=self.product).sum(-1, keepdim=True) / self.p_sum


def rows_with_teacher_(
    student: Tensor, teacher: Tensor, inputs: RowInputs, plan: RowPlan, scratch: Scratch
) -> RowTerms:
    """Replaces student logits [R, Vs] by their gradient; teacher logits [R, shared] are lost."""
    hard = None
    labels = inputs.labels if plan.with_ce else None
    target = None if labels is None else student.gather(1, labels[:, None])
    if target is not None and not plan.shares_softmax(student.shape[1]):
        hard = _hard_softmax(student, target, scratch.take("hard", student.shape))
    block, peak, agrees = _compare_(student[:, : plan.shared], teacher, plan, scratch)
    values = _divergences(block, inputs.kd_factor, plan)
    ce = _cross_entropy(block, peak, target, hard, agrees)
    if plan.with_gradient:
        if target is not None and hard is None:
            block.constant = block.constant + inputs.ce_factor[:, None] / block.q_sum
        _gradient_(block)
        student[:, plan.shared :].zero_()
        if hard is not None:
            student.addcmul_(hard.exponentials, inputs.ce_factor[:, None] / hard.total)
        _subtract_target_(student, labels, inputs.ce_factor)
    return RowTerms(values, ce, agrees)


def rows_without_teacher_(student: Tensor, inputs: RowInputs, plan: RowPlan) -> RowTerms:
    """Cross-entropy alone; replaces student logits [R, V] by their gradient."""
    if inputs.labels is None:
        raise ValueError("rows without a teacher need labels")
    target = student.gather(1, inputs.labels[:, None])
    hard = _hard_softmax(student, target, student)
    if plan.with_gradient:
        student.mul_(inputs.ce_factor[:, None] / hard.total)
        _subtract_target_(student, inputs.labels, inputs.ce_factor)
    return RowTerms(student.new_empty(0, len(student)), hard.loss.squeeze(1), hard.is_right)


class _HardSoftmax(NamedTuple):
    loss: Tensor  # [R, 1] nats
    exponentials: Tensor  # [R, V]
    total: Tensor  # [R, 1]
    is_right: Tensor  # [R] bool, whether the target is a most likely id


def _hard_softmax(student: Tensor, target: Tensor, out: Tensor) -> _HardSoftmax:
    peak = student.amax(-1, keepdim=True)
    torch.sub(student, peak, out=out).mul_(1 / LOG2).exp2_()
    total = out.sum(-1, keepdim=True)
    is_right = (target == peak).squeeze(1)
    return _HardSoftmax((peak - target) + total.log(), out, total, is_right)


def _compare_(
    student: Tensor, teacher: Tensor, plan: RowPlan, scratch: Scratch
) -> tuple[_Block, Tensor, Tensor]:
    """Both softmaxes and their gap; also the student's row maximum, and who agrees."""
    gap = torch.sub(teacher, student, out=scratch.take("gap", student.shape))
    product = scratch.take("product", student.shape)
    peak, teacher_peak = student.amax(-1, keepdim=True), teacher.amax(-1, keepdim=True)
    student.sub_(peak)
    teacher.sub_(teacher_peak)
    # Both are at most 0 and 0 at their maxima; an argmax would cost eight times as much.
    agrees = torch.add(student, teacher, out=product).amax(-1) == 0
    bits = 1 / (LOG2 * plan.temperature)  # exp2 is the cheapest exponential
    # Summed in fp64: an error of a sum is one of every gap, which no mean takes out again.
    q_sum = student.mul_(bits).exp2_().sum(-1, keepdim=True, dtype=torch.float64)
    p_sum = teacher.mul_(bits).exp2_().sum(-1, keepdim=True, dtype=torch.float64)
    # An id that both exclude has no gap; a NaN logit still shows, through its q_sum or p_sum.
    gap.nan_to_num_(nan=0.0, posinf=_IMPOSSIBLE, neginf=-_IMPOSSIBLE)
    if plan.temperature != 1.0:
        gap.mul_(1 / plan.temperature).clamp_(-_IMPOSSIBLE, _IMPOSSIBLE)
    offset = (teacher_peak - peak).double() / plan.temperature
    gap.sub_((offset + torch.log1p((p_sum - q_sum) / q_sum)).to(gap.dtype))
    q_sum, p_sum = q_sum.to(gap.dtype), p_sum.to(gap.dtype)
    has_jsd = any(name == "jsd" for name, _ in plan.mixture)
    block = _Block(
        q_exp=student, q_sum=q_sum, p_exp=teacher, p_sum=p_sum, gap=gap, product=product,
        mix=scratch.take("mix", student.shape) if has_jsd else None,
        constant=torch.zeros_like(q_sum),
    )  # fmt: skip
    return block, peak, agrees


def _divergences(block: _Block, kd_factor: Tensor, plan: RowPlan) -> Tensor:
    """Values [n_div, R]; leaves in `block` what their gradients need."""
    values: dict[int, Tensor] = {}
    # jsd comes last, since it limits the gap.
    order = sorted(range(len(plan.mixture)), key=lambda index: plan.mixture[index][0] == "jsd")
    for index in order:
        name, weight = plan.mixture[index]
        factor = (kd_factor * weight)[:, None]
        values[index] = _ROW_LOSSES[name](block, factor, plan.beta)
    if not values:
        return block.q_sum.new_empty(0, len(block.q_sum))
    stacked = torch.stack([values[index].squeeze(1) for index in range(len(values))])
    # Rounding may leave -1e-7 where the truth is 0 or just above.
    return stacked.clamp_(min=0.0).mul_(plan.value_scale)


def _forward_kl(block: _Block, factor: Tensor, beta: float) -> Tensor:
    """Value sum p (log p - log q); gradient q - p."""
    del beta
    block.constant = block.constant + factor / block.q_sum
    block.teacher = _plus(block.teacher, factor / block.p_sum)
    return _or_infinite(block.teacher_mean(block.gap))


def _reverse_kl(block: _Block, factor: Tensor, beta: float) -> Tensor:
    """Value sum q (log q - log p); gradient q (log q - log p - value)."""
    del beta
    value = -block.student_mean(block.gap)
    slope = -factor / block.q_sum
    block.constant = block.constant + slope * value
    block.gap_slope = _plus(block.gap_slope, slope)
    # Where q is 0 the gradient is too: 0 times a gap that no factor takes to infinity.
    block.gap.clamp_(min=-1e30, max=1e6)
    return _or_infinite(value)


def _jsd(block: _Block, factor: Tensor, beta: float) -> Tensor:
    """Value beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    log m - log q = log1p(beta expm1(gap)), which keeps its digits when p is close to q.
    """
    mix = block.product if block.mix is None else block.mix
    gap = block.gap.clamp_(max=_LARGEST_GAP)
    torch.expm1(gap, out=mix).mul_(beta).log1p_()
    student_part = block.student_mean(mix)
    teacher_part = block.teacher_mean(gap) - block.teacher_mean(mix)
    slope = -(1 - beta) * factor / block.q_sum
    block.constant = block.constant - slope * student_part
    block.mix_slope = slope
    return beta * teacher_part - (1 - beta) * student_part


_ROW_LOSSES: dict[str, Callable[[_Block, Tensor, float], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}


def _cross_entropy(
    block: _Block, peak: Tensor, target: Tensor | None, hard: _HardSoftmax | None, like: Tensor
) -> Tensor:
    if target is None:
        return torch.zeros_like(like, dtype=block.q_sum.dtype)
    loss = (peak - target) + block.q_sum.log() if hard is None else hard.loss
    return loss.squeeze(1)


def _gradient_(block: _Block) -> None:
    """Leaves the gradient of the shared ids in `q_exp`, a view of the student's logits."""
    out = block.q_exp
    if block.gap_slope is not None or block.mix_slope is not None:
        slopes = block.gap.mul_(0.0 if block.gap_slope is None else block.gap_slope)
        if block.mix is not None and block.mix_slope is not None:
            slopes.addcmul_(block.mix, block.mix_slope)
        out.mul_(slopes.add_(block.constant))
    else:
        out.mul_(block.constant)
    if block.teacher is not None:
        out.addcmul_(block.p_exp, block.teacher, value=-1)


def _subtract_target_(gradient: Tensor, labels: Tensor | None, ce_factor: Tensor) -> None:
    if labels is not None:
        gradient.scatter_add_(1, labels[:, None], -ce_factor[:, None])


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _or_infinite(value: Tensor) -> Tensor:
    """A row that gives mass to an id the other model excludes is infinitely far away."""
    return torch.where(value > _INFINITE, math.inf, value)
