"""Divergences on a block of rows: value, and the gradient with respect to q.

Each term has two halves, because a row may lie on several ranks. `partial_sums` writes the g of
the gradient q (g - sum q g) into the slopes of the block and returns sums over the local ids.
`finish` takes the sums over all ids, returns the value and adds the term's part to the constant.
Each class names the source of its formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
        """Return the sum of q * values over the local ids, [R, 1]."""
        return torch.mul(self.q_exp, values, out=self.product).sum(-1, keepdim=True) / self.q_sum

    def teacher_sum(self, values: Tensor) -> Tensor:
        """Return the sum of p * values over the local ids, [R, 1]."""
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


class MixtureTerm(Protocol):
    """One divergence; terms with `limits_gap` must run after all terms without it."""

    limits_gap: bool

    def partial_sums(self, block: Block, factor: Tensor, plan: RowPlan) -> Sequence[Tensor]:
        """Return sums [R, 1] over the local ids; factor [R, 1] scales the gradient."""
        ...

    def finish(self, block: Block, sums: Sequence[Tensor], factor: Tensor, plan: RowPlan) -> Tensor:
        """Return the value [R, 1] from the sums over all ids."""
        ...


class ForwardKL:
    """Value sum p (log p - log q); gradient q - p. Hinton et al. 2015."""

    limits_gap = False

    def partial_sums(self, block: Block, factor: Tensor, plan: RowPlan) -> Sequence[Tensor]:
        """Return sum p gap."""
        del plan
        share = factor / block.p_sum
        block.teacher = share if block.teacher is None else block.teacher + share
        return [block.teacher_sum(block.gap)]

    def finish(self, block: Block, sums: Sequence[Tensor], factor: Tensor, plan: RowPlan) -> Tensor:
        """Return the sum."""
        del plan
        block.constant = block.constant + factor
        return _or_infinite(sums[0])


class ReverseKL:
    """Value sum q (log q - log p); gradient q (log q - log p - value). Gu et al. 2024."""

    limits_gap = False

    def partial_sums(self, block: Block, factor: Tensor, plan: RowPlan) -> Sequence[Tensor]:
        """Return sum q gap."""
        del plan
        total = block.student_sum(block.gap)
        # The gradient is 0 if q is 0: the gap is limited so that no factor makes it infinite.
        block.add_slope(torch.clamp(block.gap, -1e30, 1e6, out=block.product), -factor)
        return [total]

    def finish(self, block: Block, sums: Sequence[Tensor], factor: Tensor, plan: RowPlan) -> Tensor:
        """Return minus the sum."""
        del plan
        value = -sums[0]
        # An infinite value adds nothing: the gradient of the row comes only from its finite ids.
        block.constant = block.constant - factor * value.clamp(max=1e30)
        return _or_infinite(value)


class JensenShannon:
    """Value beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Gradient (1 - beta) q (log q - log m - KL(q || m)). Agarwal et al. 2024, GKD, equation 1.
    """

    limits_gap = True

    def partial_sums(self, block: Block, factor: Tensor, plan: RowPlan) -> Sequence[Tensor]:
        """Return sum q (log m - log q), and sum p (log p - log m) formed from two sums."""
        mix = block.log_mix(plan.beta)
        block.add_slope(mix, -(1 - plan.beta) * factor)
        teacher_part = block.teacher_sum(block.gap) - block.teacher_sum(mix)
        return [block.student_sum(mix), teacher_part]

    def finish(self, block: Block, sums: Sequence[Tensor], factor: Tensor, plan: RowPlan) -> Tensor:
        """Return the weighted sum of both halves."""
        student_part, teacher_part = sums
        block.constant = block.constant + (1 - plan.beta) * factor * student_part
        return plan.beta * teacher_part - (1 - plan.beta) * student_part


class SkewKL:
    """Value sum p (log p - log m), m = skew p + (1 - skew) q; Ko et al. 2024, DistiLLM.

    With u = p / m - 1 the gradient is -(1 - skew) q (u - sum q u).
    """

    limits_gap = True

    def partial_sums(self, block: Block, factor: Tensor, plan: RowPlan) -> Sequence[Tensor]:
        """Return sum p (log p - log m), and sum q u."""
        mix = block.log_mix(plan.skew)
        value = block.teacher_sum(block.gap) - block.teacher_sum(mix)
        excess = torch.sub(block.gap, mix, out=mix).expm1_()
        block.add_slope(excess, -(1 - plan.skew) * factor)
        return [value, block.student_sum(excess)]

    def finish(self, block: Block, sums: Sequence[Tensor], factor: Tensor, plan: RowPlan) -> Tensor:
        """Return the first sum; the second is part of the gradient."""
        value, excess = sums
        block.constant = block.constant + (1 - plan.skew) * factor * excess
        return value


class SkewReverseKL:
    """Value sum q (log q - log m), m = (1 - skew) p + skew q; Ko et al. 2024, DistiLLM.

    With v = q / m - 1 the gradient is q (log q - log m - skew v - value + skew sum q v).
    """

    limits_gap = True

    def partial_sums(self, block: Block, factor: Tensor, plan: RowPlan) -> Sequence[Tensor]:
        """Return sum q (log m - log q), and sum q v."""
        mix = block.log_mix(1 - plan.skew)
        total = block.student_sum(mix)
        block.add_slope(mix, -factor)
        excess = mix.neg_().expm1_()
        block.add_slope(excess, -plan.skew * factor)
        return [total, block.student_sum(excess)]

    def finish(self, block: Block, sums: Sequence[Tensor], factor: Tensor, plan: RowPlan) -> Tensor:
        """Return minus the first sum; the second is part of the gradient."""
        total, excess = sums
        block.constant = block.constant + factor * (total + plan.skew * excess)
        return -total


class TotalVariation:
    """Value sum |p - q| / 2 = sum max(p - q, 0); gradient q (sign(q - p) - sum q sign(q - p)) / 2.

    Wen et al. 2023, f-Distill. The sign is the sign of the gap, which separates close logits.
    """

    limits_gap = True

    def partial_sums(self, block: Block, factor: Tensor, plan: RowPlan) -> Sequence[Tensor]:
        """Return sum max(p - q, 0), and sum q sign(p - q)."""
        del plan
        mix = block.scratch.take("mix", block.gap.shape)
        # p - q = p (1 - exp(-gap)) keeps its digits if p is close to q.
        torch.clamp(block.limited_gap(), min=0.0, out=mix).neg_().expm1_().neg_()
        value = block.teacher_sum(mix)
        sign = torch.sign(block.gap, out=mix)
        block.add_slope(sign, -0.5 * factor)
        return [value, block.student_sum(sign)]

    def finish(self, block: Block, sums: Sequence[Tensor], factor: Tensor, plan: RowPlan) -> Tensor:
        """Return the first sum; the second is part of the gradient."""
        del plan
        value, sign = sums
        block.constant = block.constant + 0.5 * factor * sign
        return value


class TeacherEntropy:
    """Value -sum p log p, which no gradient reaches; for statistics."""

    limits_gap = False

    def partial_sums(self, block: Block, factor: Tensor, plan: RowPlan) -> Sequence[Tensor]:
        """Return sum p log p_exp."""
        del factor, plan
        # The logarithm of 0 is limited: 0 times -inf would be NaN.
        logs = torch.log(block.p_exp, out=block.product).clamp_(min=_LEAST_LOG)
        return [block.teacher_sum(logs)]

    def finish(self, block: Block, sums: Sequence[Tensor], factor: Tensor, plan: RowPlan) -> Tensor:
        """Return log p_sum minus the sum."""
        del factor, plan
        return block.p_sum.log() - sums[0]


MIXTURE_TERMS: Mapping[str, MixtureTerm] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd": JensenShannon(),
    "skew_kl": SkewKL(),
    "skew_rkl": SkewReverseKL(),
    "tvd": TotalVariation(),
    "teacher_entropy": TeacherEntropy(),
}


def _or_infinite(value: Tensor) -> Tensor:
    """Return infinity for a row that gives mass to an id that the other model excludes."""
    return torch.where(value > _INFINITE, math.inf, value)
