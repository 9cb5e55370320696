"""Divergences and cross-entropy of blocks of rows, with their gradients, in plain torch.

The functions work in place, in few passes, on buffers [R, V] that stay in the cache.
Notation as in the public functions: q student, p teacher, both over the shared ids;
`gap` = log p - log q. For any loss f(p, q) with g = df/dq, the gradient with respect to
the student's logits is q (g - sum q g) / T. Every term writes its g into the `slopes`
of the block (or, for the forward KL, into a factor of p), and its sum q g into a constant.

Numerics: the row maximum and log Z are kept separate (log q = (a - max) - log Z). The gap is
formed from the raw logits, because the difference of close logits is exact; a large shift between
the models is subtracted first. The difference of two log Z is log1p of a quotient. The rounding
of large logits therefore does not hide small differences between student and teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.row_mixtures import LIMITS_GAP, MIXTURE_TERMS, Block
from megakd_kernels.row_plan import RowInputs, RowPlan, RowTerms, Scratch, Warp

LOG2 = math.log(2.0)
# Represents log(p / 0): its product with 0 is 0, and its product with a probability above 1e-30
# is above _INFINITE.
_IMPOSSIBLE = 1e38
# Largest difference of the two row maxima that is not subtracted: up to here, rounding the
# difference costs no more than rounding the logits.
_LARGEST_SHIFT = 1.0


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Row kernel that runs a plan on blocks of at most the rows of `scratch`."""

    plan: RowPlan
    scratch: Scratch

    def run_(
        self, student: Tensor, teacher: Tensor | None, inputs: RowInputs, gradient: Tensor | None
    ) -> RowTerms:
        """Run the plan as `RowKernel.run_`; work in place on the student's logits."""
        bend = self._warp_(student, self.plan.student_warp, "bend")
        if teacher is None:
            terms = self._without_teacher_(student, inputs)
        else:
            self._warp_(teacher, self.plan.teacher_warp, None)
            terms = self._with_teacher_(student, teacher, inputs)
        if bend is not None and self.plan.with_gradient:
            student.mul_(bend)
        if gradient is not None and gradient is not student:
            gradient.copy_(student)
        return terms

    def _warp_(self, logits: Tensor, warp: Warp, name: str | None) -> Tensor | float | None:
        """Scale and cap in place; return the derivative if `name` names a buffer for it."""
        if warp.is_identity:
            return None
        if warp.softcap == 0.0:
            logits.mul_(warp.scale)
            return warp.scale
        logits.mul_(warp.scale / warp.softcap).tanh_()
        derivative = None
        if name is not None and self.plan.with_gradient:
            derivative = self.scratch.take(name, logits.shape)
            torch.mul(logits, logits, out=derivative).mul_(-warp.scale).add_(warp.scale)
        logits.mul_(warp.softcap)
        return derivative

    def _with_teacher_(self, student: Tensor, teacher: Tensor, inputs: RowInputs) -> RowTerms:
        plan = self.plan
        hard = target = None
        if plan.with_ce and inputs.labels is not None:
            if plan.shares_softmax(student.shape[1]):
                target = student.gather(1, inputs.labels[:, None])
            else:
                hard = self._hard_softmax(student, inputs.labels, self._take("hard", student))
        block, peak, agrees = self._compare_(student[:, : plan.shared], teacher)
        values = dict[int, Tensor]()
        # Terms that mix p and q run last because they limit the gap.
        for i in sorted(range(len(plan.mixture)), key=lambda i: plan.mixture[i][0] in LIMITS_GAP):
            name, weight = plan.mixture[i]
            factor = (inputs.kd_factor * weight)[:, None]
            values[i] = MIXTURE_TERMS[name](block, factor, plan).squeeze(1)
        divergences = torch.stack([values[i] for i in range(len(values))])
        # Rounding may give -1e-7 if the exact value is 0 or slightly above 0.
        divergences = divergences.clamp_(min=0.0).mul_(plan.value_scale)
        ce = self._cross_entropy(block, peak, target, hard, inputs)
        if plan.with_gradient:
            self._write_gradient_(student, block, hard, inputs)
        return RowTerms(divergences, ce, agrees)

    def _without_teacher_(self, student: Tensor, inputs: RowInputs) -> RowTerms:
        """Compute cross-entropy without divergences."""
        if inputs.labels is None:
            raise ValueError("rows without a teacher need labels")
        agrees = chance_of_id(student, inputs.labels, self._take("product", student))
        hard = self._hard_softmax(student, inputs.labels, student)
        if self.plan.with_gradient:
            student.mul_(inputs.ce_factor[:, None] / hard.total)
            self._subtract_target_(student, inputs)
        empty = student.new_empty(0, len(student))
        return RowTerms(empty, hard.loss.squeeze(1), agrees)

    def _hard_softmax(self, student: Tensor, labels: Tensor, out: Tensor) -> _HardSoftmax:
        target = student.gather(1, labels[:, None])
        peak = student.amax(-1, keepdim=True)
        torch.sub(student, peak, out=out).mul_(1 / LOG2).exp2_()
        total = out.sum(-1, keepdim=True)
        return _HardSoftmax((peak - target) + total.log(), out, total)

    def _compare_(self, student: Tensor, teacher: Tensor) -> tuple[Block, Tensor, Tensor]:
        """Return both softmaxes with their gap, the student's row maximum, and row agreement."""
        temperature = self.plan.temperature
        product = self._take("product", student)
        peak = student.amax(-1, keepdim=True)
        teacher_peak = _near_(teacher, teacher.amax(-1, keepdim=True), peak)
        gap = torch.sub(teacher, student, out=self._take("gap", student))
        student.sub_(peak)
        teacher.sub_(teacher_peak)
        agrees = chance_of_match(student, teacher, product)
        bits = 1 / (LOG2 * temperature)  # exp2 is the cheapest exponential
        # Summed in fp64: an error of the sum is an error of every gap, and no mean removes it.
        q_sum = student.mul_(bits).exp2_().sum(-1, keepdim=True, dtype=torch.float64)
        p_sum = teacher.mul_(bits).exp2_().sum(-1, keepdim=True, dtype=torch.float64)
        # The gap of an id that both models exclude is 0. A NaN logit still shows in q_sum or p_sum.
        gap.nan_to_num_(nan=0.0, posinf=_IMPOSSIBLE, neginf=-_IMPOSSIBLE)
        if temperature != 1.0:
            gap.mul_(1 / temperature).clamp_(-_IMPOSSIBLE, _IMPOSSIBLE)
        offset = (teacher_peak - peak).double() / temperature
        gap.sub_((offset + torch.log1p((p_sum - q_sum) / q_sum)).to(gap.dtype))
        block = Block(
            q_exp=student, q_sum=q_sum.to(gap.dtype), p_exp=teacher, p_sum=p_sum.to(gap.dtype),
            gap=gap, product=product, scratch=self.scratch,
            constant=torch.zeros_like(peak),
        )  # fmt: skip
        return block, peak, agrees

    def _cross_entropy(
        self,
        block: Block,
        peak: Tensor,
        target: Tensor | None,
        hard: _HardSoftmax | None,
        inputs: RowInputs,
    ) -> Tensor:
        """Return cross-entropy [R] in nats.

        If it shares the softmax of the divergences, its gradient becomes part of the block's.
        """
        if hard is not None:
            return hard.loss.squeeze(1)
        if target is None:
            return torch.zeros_like(inputs.kd_factor)
        block.constant = block.constant + inputs.ce_factor[:, None]
        return ((peak - target) + block.q_sum.log()).squeeze(1)

    def _write_gradient_(
        self, student: Tensor, block: Block, hard: _HardSoftmax | None, inputs: RowInputs
    ) -> None:
        block.write_gradient_()
        if self.plan.shared < student.shape[1]:
            student[:, self.plan.shared :].zero_()
        if hard is not None:
            student.addcmul_(hard.exponentials, inputs.ce_factor[:, None] / hard.total)
        if self.plan.with_ce:
            self._subtract_target_(student, inputs)

    def _subtract_target_(self, gradient: Tensor, inputs: RowInputs) -> None:
        if inputs.labels is not None:
            gradient.scatter_add_(1, inputs.labels[:, None], -inputs.ce_factor[:, None])

    def _take(self, name: str, like: Tensor) -> Tensor:
        return self.scratch.take(name, like.shape)


class _HardSoftmax(NamedTuple):
    loss: Tensor  # [R, 1] nats
    exponentials: Tensor  # [R, V]
    total: Tensor  # [R, 1]


def chance_of_match(student: Tensor, teacher: Tensor, out: Tensor) -> Tensor:
    """Return [R], the probability that both models draw the same of their equal maxima.

    Args:
        student, teacher: [R, V] logits minus their maxima.
        out: [R, V] buffer, overwritten.
    """
    # At most 0, and 0 at a maximum. As numbers: to sum booleans takes five times as long.
    both = torch.eq(torch.add(student, teacher, out=out), 0, out=out).sum(1)
    drawn = [torch.eq(logits, 0, out=out).sum(1) for logits in (student, teacher)]
    return both / (drawn[0] * drawn[1]).clamp(min=1)  # a row with NaN has no maximum


def chance_of_id(logits: Tensor, ids: Tensor, out: Tensor) -> Tensor:
    """Return [R], the probability that `ids` [R] are drawn of the equal maxima of their rows.

    out: [R, V] buffer, overwritten.
    """
    is_top = torch.eq(logits, logits.amax(-1, keepdim=True), out=out)
    return is_top.gather(1, ids[:, None]).squeeze(1) / is_top.sum(1).clamp(min=1)


def _near_(teacher: Tensor, teacher_peak: Tensor, peak: Tensor) -> Tensor:
    """Subtract a large shift common to a row from the teacher's logits; return the new maximum.

    The difference of distant logits loses digits of the gap. The difference of close logits is
    exact, and a shift would only round the logits.
    """
    shift = teacher_peak - peak
    # The shift is read only on a CPU, where reading is free: most models need no pass for it.
    if teacher.is_cpu and bool((shift.abs() <= _LARGEST_SHIFT).all()):
        return teacher_peak
    shift = torch.where(shift.isfinite() & (shift.abs() > _LARGEST_SHIFT), shift, 0)
    teacher.sub_(shift)
    return teacher_peak - shift
