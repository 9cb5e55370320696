"""Divergences and cross-entropy of blocks of rows, with their gradients, in plain torch.

Works in place on buffers [R, V] that stay in the cache, in few passes.
Notation as in the public functions: q student, p teacher, both over the shared ids;
`gap` = log p - log q. For any loss f(p, q) with g = df/dq the gradient with respect to
the student's logits is q (g - sum q g) / T. Every term here writes its g into the `slopes`
of the block (or, for the forward KL, into a factor of p), and its sum q g into a constant.

Numerics: the row maximum and log Z are kept apart (log q = (a - max) - log Z). The gap is
formed from the raw logits, whose difference is exact where they are close (a large shift between
the models is taken off first), and the difference of two log Z is log1p of a quotient, so that a
student close to its teacher does not drown in the rounding of large logits. A row may lie on
several ranks: `Reduce` joins its parts, in three rounds whatever the loss (maxima; sums; means).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.row_mixtures import MIXTURE_TERMS, Block
from megakd_kernels.row_plan import (
    Reduce,
    RowInputs,
    RowPlan,
    RowTerms,
    Scratch,
    Warp,
    WholeRows,
)

LOG2 = math.log(2.0)
# Stands for log(p / 0): 0 times it is 0, and a probability above 1e-30 makes it _INFINITE.
_IMPOSSIBLE = 1e38
# Of the two row maxima; below it a rounded difference is as good as two rounded logits.
_LARGEST_SHIFT = 1.0
_WHOLE_ROWS = WholeRows()


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Runs a plan on blocks of at most `scratch`'s rows."""

    plan: RowPlan
    scratch: Scratch
    reduce: Reduce = _WHOLE_ROWS

    def run_(
        self, student: Tensor, teacher: Tensor | None, inputs: RowInputs, gradient: Tensor | None
    ) -> RowTerms:
        """See `RowKernel`; works in place on the student's logits."""
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
        """Scales and caps in place; the derivative, if it is asked for by name."""
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
        plan, reduce = self.plan, self.reduce
        hard = None
        if plan.with_ce and inputs.labels is not None and not plan.shares_softmax(student.shape[1]):
            hard = self._hard_softmax(student, inputs.labels, self._take("hard", student))
        target = None
        if plan.with_ce and inputs.labels is not None and hard is None:
            target = student.gather(1, inputs.labels[:, None])
        block, peak, agrees = self._compare_(student[:, : plan.shared], teacher)
        terms = [MIXTURE_TERMS[name] for name, _ in plan.mixture]
        # Those that mix p and q come last, since they limit the gap.
        order = sorted(range(len(terms)), key=lambda index: terms[index].limits_gap)
        factors = [(inputs.kd_factor * weight)[:, None] for _, weight in plan.mixture]
        partial = {i: terms[i].partial_sums(block, factors[i], plan) for i in order}
        sums = reduce.total(torch.stack([s for i in order for s in partial[i]]))
        values, taken = {}, 0
        for i in order:
            mine = sums[taken : taken + len(partial[i])]
            taken += len(mine)
            values[i] = terms[i].finish(block, mine, factors[i], plan).squeeze(1)
        divergences = torch.stack([values[i] for i in range(len(terms))])
        # Rounding may leave -1e-7 where the truth is 0 or just above.
        divergences = divergences.clamp_(min=0.0).mul_(plan.value_scale)
        ce = self._cross_entropy(block, peak, target, hard, inputs)
        if plan.with_gradient:
            self._write_gradient_(student, block, hard, inputs)
        return RowTerms(divergences, ce, agrees)

    def _without_teacher_(self, student: Tensor, inputs: RowInputs) -> RowTerms:
        """Cross-entropy alone."""
        if inputs.labels is None:
            raise ValueError("rows without a teacher need labels")
        hard = self._hard_softmax(student, inputs.labels, student)
        if self.plan.with_gradient:
            student.mul_(inputs.ce_factor[:, None] / hard.total)
            self._subtract_target_(student, inputs)
        empty = student.new_empty(0, len(student))
        return RowTerms(empty, hard.loss.squeeze(1), hard.is_right)

    def _hard_softmax(self, student: Tensor, labels: Tensor, out: Tensor) -> _HardSoftmax:
        reduce = self.reduce
        target = self._own_target(student, labels)
        peak = reduce.maximum(_row_maximum(student))
        torch.sub(student, peak, out=out).mul_(1 / LOG2).exp2_()
        sums = reduce.total(torch.stack([out.sum(-1, keepdim=True), target]))
        total, target = sums.unbind(0)
        is_right = (target == peak).squeeze(1)
        return _HardSoftmax((peak - target) + total.log(), out, total, is_right)

    def _own_target(self, student: Tensor, labels: Tensor) -> Tensor:
        """[R, 1]: the label's logit on the rank that has it, 0 on the others."""
        if not self.plan.has_shards:
            return student.gather(1, labels[:, None])
        index, is_here = self._own_label(labels, student.shape[1])
        if student.shape[1] == 0:
            return torch.zeros_like(student[:, :1].sum(1, keepdim=True))
        return torch.where(is_here[:, None], student.gather(1, index[:, None]), 0)

    def _own_label(self, labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
        index = labels - self.plan.vocab_start
        is_here = (index >= 0) & (index < width)
        return torch.where(is_here, index, 0), is_here

    def _compare_(self, student: Tensor, teacher: Tensor) -> tuple[Block, Tensor, Tensor]:
        """Both softmaxes and their gap; also the student's row maximum, and who agrees."""
        reduce, temperature = self.reduce, self.plan.temperature
        product = self._take("product", student)
        peaks = reduce.maximum(torch.stack([_row_maximum(student), _row_maximum(teacher)]))
        peak, teacher_peak = peaks.unbind(0)
        teacher_peak = _near_(teacher, teacher_peak, peak)
        gap = torch.sub(teacher, student, out=self._take("gap", student))
        student.sub_(peak)
        teacher.sub_(teacher_peak)
        # Both are at most 0 and 0 at their maxima; an argmax would cost eight times as much.
        common = _row_maximum(torch.add(student, teacher, out=product)) == 0
        bits = 1 / (LOG2 * temperature)  # exp2 is the cheapest exponential
        # Summed in fp64: an error of a sum is one of every gap, which no mean takes out again.
        q_sum = student.mul_(bits).exp2_().sum(-1, keepdim=True, dtype=torch.float64)
        p_sum = teacher.mul_(bits).exp2_().sum(-1, keepdim=True, dtype=torch.float64)
        q_sum, p_sum, found = reduce.total(torch.stack([q_sum, p_sum, common.double()])).unbind(0)
        # An id that both exclude has no gap; a NaN logit still shows, through its q_sum or p_sum.
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
        return block, peak, (found > 0).squeeze(1)

    def _cross_entropy(
        self,
        block: Block,
        peak: Tensor,
        target: Tensor | None,
        hard: _HardSoftmax | None,
        inputs: RowInputs,
    ) -> Tensor:
        """Nats [R]; where the softmax is the divergences' its gradient joins theirs."""
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
        student[:, self.plan.shared :].zero_()
        if hard is not None:
            student.addcmul_(hard.exponentials, inputs.ce_factor[:, None] / hard.total)
        if self.plan.with_ce:
            self._subtract_target_(student, inputs)

    def _subtract_target_(self, gradient: Tensor, inputs: RowInputs) -> None:
        labels, factor = inputs.labels, inputs.ce_factor
        if labels is None or gradient.shape[1] == 0:
            return
        if self.plan.has_shards:
            labels, is_here = self._own_label(labels, gradient.shape[1])
            factor = torch.where(is_here, factor, 0)
        gradient.scatter_add_(1, labels[:, None], -factor[:, None])

    def _take(self, name: str, like: Tensor) -> Tensor:
        return self.scratch.take(name, like.shape)


class _HardSoftmax(NamedTuple):
    loss: Tensor  # [R, 1] nats
    exponentials: Tensor  # [R, V]
    total: Tensor  # [R, 1]
    is_right: Tensor  # [R] bool, whether the target is a most likely id


def _near_(teacher: Tensor, teacher_peak: Tensor, peak: Tensor) -> Tensor:
    """Takes a large shift common to a row off the teacher's logits; its row maximum then.

    A difference of logits that are far apart loses the digits of the gap. Where they are close it
    is exact, and a shift would only round them.
    """
    shift = teacher_peak - peak
    shift = torch.where(shift.isfinite() & (shift.abs() > _LARGEST_SHIFT), shift, 0)
    # Looked at where looking costs nothing: most models need no pass for it.
    if not teacher.is_cpu or bool(shift.any()):
        teacher.sub_(shift)
    return teacher_peak - shift


def _row_maximum(logits: Tensor) -> Tensor:
    """[R, 1]; -inf for a rank that has no id."""
    if logits.shape[1] == 0:
        return logits.new_full((len(logits), 1), -math.inf)
    return logits.amax(-1, keepdim=True)
