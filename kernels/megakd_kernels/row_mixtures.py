"""Divergences on a block of rows: value, and the gradient with respect to q.

Each term writes the g of the gradient q (g - sum q g) into the slopes of the block, adds its
sum q g to the constant, and returns its value. It names the source of its formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd_kernels.row_plan import RowPlan, Scratch

_INFINITE = 1e8
# exp(80) is finite in fp32, and q <= exp(-80) does not change a sum with 1.
_LARGEST_GAP = 80.0
_LEAST_LOG = -1e6


@dataclass
class Block:
    """The softmaxes of one block, and the parts of its gradient.

    The gradient is q_exp (constant / q_sum + slopes) - teacher * p_exp.
    """

    q_exp: Tensor  # [R, V], not yet divided by q_sum
    q_sum: Tensor  # [R, 1]
    p_exp: Tensor
    p_sum: Tensor
    gap: Tensor  # [R, V] log p - log q
    product: Tensor  # [R, V] free for products
    scratch: Scratch
    constant: Tensor  # [R, 1]
    slopes: Tensor | None = None  # [R, V]
    teacher: Tensor | None = None  # [R, 1]

    def student_sum(self, values: Tensor) -> Tensor:
        """Return the sum of q * values over the ids, [R, 1]."""
        return torch.mul(self.q_exp, values, out=self.product).sum(-1, keepdim=True) / self.q_sum

    def teacher_sum(self, values: Tensor) -> Tensor:
        """Return the sum of p * values over the ids, [R, 1]."""
        return torch.mul(self.p_exp, values, out=self.product).sum(-1, keepdim=True) / self.p_sum

    def add_slope(self, values: Tensor, factor: Tensor) -> None:
        """Add factor [R, 1] * values [R, V] to the slopes."""
        factor = factor / self.q_sum
        if self.slopes is None:
            self.slopes = self.scratch.take("slopes", values.shape)
            torch.mul(values, factor, out=self.slopes)
        else:
            self.slopes.addcmul_(values, factor)

    def limited_gap(self) -> Tensor:
        """Limit the gap in place to at most 80 and return it."""
        return self.gap.clamp_(max=_LARGEST_GAP)

    def log_mix(self, share: float) -> Tensor:
        """Return log m - log q with m = share * p + (1 - share) * q, [R, V] in a separate buffer.

        log1p(share expm1(gap)) keeps its digits if p is close to q.
        """
        mix = self.scratch.take("mix", self.gap.shape)
        return torch.expm1(self.limited_gap(), out=mix).mul_(share).log1p_()

    def write_gradient_(self) -> None:
        """Write the gradient to `q_exp`, a view of the student's logits."""
        out, constant = self.q_exp, self.constant / self.q_sum
        out.mul_(constant if self.slopes is None else self.slopes.add_(constant))
        if self.teacher is not None:
            # Two roundings instead of a fused one: q = p gives a gradient of exactly zero.
            out.sub_(torch.mul(self.p_exp, self.teacher, out=self.product))


def _forward_kl(block: Block, factor: Tensor, plan: RowPlan) -> Tensor:
    """Value sum p (log p - log q); gradient q - p. Hinton et al. 2015."""
    del plan
    share = factor / block.p_sum
    block.teacher = share if block.teacher is None else block.teacher + share
    block.constant = block.constant + factor
    return _or_infinite(block.teacher_sum(block.gap))


def _reverse_kl(block: Block, factor: Tensor, plan: RowPlan) -> Tensor:
    """Value sum q (log q - log p); gradient q (log q - log p - value). Gu et al. 2024."""
    del plan
    value = -block.student_sum(block.gap)
    # The gradient is 0 if q is 0: the gap is limited so that no factor makes it infinite.
    block.add_slope(torch.clamp(block.gap, -1e30, 1e6, out=block.product), -factor)
    # An infinite value adds nothing: the gradient of the row comes only from its finite ids.
    block.constant = block.constant - factor * value.clamp(max=1e30)
    return _or_infinite(value)


def _jsd(block: Block, factor: Tensor, plan: RowPlan) -> Tensor:
    """Value beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Gradient (1 - beta) q (log q - log m - KL(q || m)). Agarwal et al. 2024, GKD, equation 1.
    """
    mix = block.log_mix(plan.beta)
    block.add_slope(mix, -(1 - plan.beta) * factor)
    teacher_part = block.teacher_sum(block.gap) - block.teacher_sum(mix)
    student_part = block.student_sum(mix)
    block.constant = block.constant + (1 - plan.beta) * factor * student_part
    return plan.beta * teacher_part - (1 - plan.beta) * student_part


def _skew_kl(block: Block, factor: Tensor, plan: RowPlan) -> Tensor:
    """Value sum p (log p - log m), m = skew p + (1 - skew) q; Ko et al. 2024, DistiLLM.

    With u = p / m - 1 the gradient is -(1 - skew) q (u - sum q u).
    """
    mix = block.log_mix(plan.skew)
    value = block.teacher_sum(block.gap) - block.teacher_sum(mix)
    excess = torch.sub(block.gap, mix, out=mix).expm1_()
    block.add_slope(excess, -(1 - plan.skew) * factor)
    block.constant = block.constant + (1 - plan.skew) * factor * block.student_sum(excess)
    return value


def _skew_rkl(block: Block, factor: Tensor, plan: RowPlan) -> Tensor:
    """Value sum q (log q - log m), m = (1 - skew) p + skew q; Ko et al. 2024, DistiLLM.

    With v = q / m - 1 the gradient is q (log q - log m - skew v - value + skew sum q v).
    """
    mix = block.log_mix(1 - plan.skew)
    total = block.student_sum(mix)
    block.add_slope(mix, -factor)
    excess = mix.neg_().expm1_()
    block.add_slope(excess, -plan.skew * factor)
    excess_sum = block.student_sum(excess)
    block.constant = block.constant + factor * (total + plan.skew * excess_sum)
    return -total


def _tvd(block: Block, factor: Tensor, plan: RowPlan) -> Tensor:
    """Value sum |p - q| / 2 = sum max(p - q, 0); gradient q (sign(q - p) - sum q sign(q - p)) / 2.

    Wen et al. 2023, f-Distill. The sign is the sign of the gap, which separates close logits.
    """
    del plan
    mix = block.scratch.take("mix", block.gap.shape)
    # p - q = p (1 - exp(-gap)) keeps its digits if p is close to q.
    torch.clamp(block.limited_gap(), min=0.0, out=mix).neg_().expm1_().neg_()
    value = block.teacher_sum(mix)
    sign = torch.sign(block.gap, out=mix)
    block.add_slope(sign, -0.5 * factor)
    block.constant = block.constant + 0.5 * factor * block.student_sum(sign)
    return value


def _teacher_entropy(block: Block, factor: Tensor, plan: RowPlan) -> Tensor:
    """Value -sum p log p, which no gradient reaches; for statistics."""
    del factor, plan
    # The logarithm of 0 is limited: 0 times -inf would be NaN.
    logs = torch.log(block.p_exp, out=block.product).clamp_(min=_LEAST_LOG)
    return block.p_sum.log() - block.teacher_sum(logs)


# A term takes a factor [R, 1] of its gradient, and returns its values [R, 1].
MIXTURE_TERMS: Mapping[str, Callable[[Block, Tensor, RowPlan], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_rkl": _skew_rkl,
    "tvd": _tvd,
    "teacher_entropy": _teacher_entropy,
}
# They run after all others.
LIMITS_GAP = ("jsd", "skew_kl", "skew_rkl", "tvd")


def _or_infinite(value: Tensor) -> Tensor:
    """Return infinity for a row that gives mass to an id that the other model excludes."""
    return torch.where(value > _INFINITE, math.inf, value)
