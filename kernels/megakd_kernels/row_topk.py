"""Distillation from the k best ids of a cached teacher, on blocks of rows, in plain torch.

The ids K of a row and the other ids are processed separately, so that no probability is a
difference of two close numbers. Let e = exp(logits of the other ids minus their maximum), R =
sum e, and q_rest the student's probability of all other ids. With the rest of `TopK`, the
gradient with respect to the student's logits, times the temperature, is

    q_i - p_i                 for i in K,
    (q_rest - rest) e_j / R   for the other ids j.

Notation as in the public functions: q student, p teacher. Shapes: R rows, V ids, k ids kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.row_losses import LOG2, chance_of_id
from megakd_kernels.row_plan import RowInputs, RowTerms, Scratch


class TopK(NamedTuple):
    """Target of a teacher for every row, whose probabilities sum to 1 unless it has no id.

    ids: [R, k] int64, distinct within a row; below 0 for missing entries.
    log_p: [R, k] log-probabilities of the teacher, -inf for missing entries.
    rest: [R] total probability of the ids not in K if the loss compares it, else 0.
    best: [R] int64, the teacher's most likely id (the first of several), below 0 if a row has
        no id.
    """

    ids: Tensor
    log_p: Tensor
    rest: Tensor
    best: Tensor

    def rows(self, index: Tensor | slice) -> TopK:
        """Return the target for a subset of the rows."""
        return TopK(*(tensor[index] for tensor in self))


@dataclass(frozen=True, kw_only=True)
class TopKPlan:
    """Computation that a row kernel performs for every row; fields as in `RowPlan`."""

    temperature: float
    value_scale: float
    with_ce: bool
    with_gradient: bool


class _Row(NamedTuple):
    """Sums and maxima of a block of rows, [R, 1] in fp64."""

    kept: Tensor  # [R, k] logits minus the row maximum, -inf without an id
    peak: Tensor  # row maximum
    drop: Tensor  # maximum of the ids not in K minus the row maximum; 0 without such ids
    others: Tensor  # sum over the ids not in K of exp((logit - their maximum) / T)
    log_total: Tensor  # log of the sum over all ids of exp((logit - peak) / T)


@dataclass(frozen=True, kw_only=True)
class TopKRows:
    """Row kernel that runs a plan on blocks of at most the rows of `scratch`."""

    plan: TopKPlan
    scratch: Scratch

    def run_(
        self, student: Tensor, teacher: TopK, inputs: RowInputs, gradient: Tensor | None
    ) -> RowTerms:
        """Return the values of all rows; form the gradient with respect to the student's logits.

        Args:
            student: [R, V] logits, overwritten; finite in rows that are not valid.
            teacher: target for these rows.
            inputs: inputs per row, as for `row_plan.RowKernel`.
            gradient: [R, V] output, possibly in another dtype, possibly `student` itself;
                None: no gradient is requested.
        """
        plan = self.plan
        index, is_kept = teacher.ids.clamp(min=0), teacher.ids >= 0
        kept = student.gather(1, index).masked_fill(~is_kept, -math.inf)
        agrees = chance_of_id(
            student, teacher.best.clamp(min=0), self.scratch.take("hard", student.shape)
        ) * (teacher.best >= 0)
        labels = inputs.labels if plan.with_ce else None
        target = None if labels is None else student.gather(1, labels[:, None])
        hard = self._hard_exponentials(student) if labels is not None else None
        # A missing entry adds 0 to the logit of id 0, which stays unchanged.
        student.scatter_add_(1, index, torch.where(is_kept, -math.inf, 0.0).to(student.dtype))
        row = self._exponentials_(student, kept)
        log_q = row.kept / plan.temperature - row.log_total
        divergence = self._divergence(teacher, row, log_q)
        ce = torch.zeros_like(inputs.ce_factor)
        if target is not None:
            log_total = row.log_total if hard is None else hard.sum(1, keepdim=True).double().log()
            ce = (log_total - (target.double() - row.peak)).squeeze(1).to(ce.dtype)
        if plan.with_gradient:
            self._gradient_(student, teacher, row, log_q.exp(), inputs)
            self._hard_gradient_(student, hard, inputs)
        if gradient is not None and gradient is not student:
            gradient.copy_(student)
        divergence = divergence.to(ce.dtype) * plan.value_scale
        return RowTerms(divergence[None], ce, agrees)

    def _hard_exponentials(self, student: Tensor) -> Tensor | None:
        """Return exp(logit - row maximum) at temperature 1; None if the plan's temperature is 1."""
        if self.plan.temperature == 1.0:
            return None
        out = self.scratch.take("hard", student.shape)
        torch.sub(student, student.amax(-1, keepdim=True), out=out)
        return out.mul_(1 / LOG2).exp2_()

    def _exponentials_(self, student: Tensor, kept: Tensor) -> _Row:
        """Write exp((logit - maximum of ids not in K) / T) to `student`, 0 for the ids in K."""
        temperature = self.plan.temperature
        highest = student.amax(-1, keepdim=True)
        peak = torch.maximum(highest, kept.amax(-1, keepdim=True)).double()
        base = torch.where(highest == -math.inf, 0, highest)  # K may hold all ids
        student.sub_(base).mul_(1 / (LOG2 * temperature)).exp2_()
        # Summed in fp64: an error of the sum is an error of every log q, and no mean removes it.
        others = student.sum(-1, keepdim=True, dtype=torch.float64)
        drop = torch.where(highest == -math.inf, 0, highest.double() - peak)
        kept = kept.double() - peak
        total = (kept / temperature).exp().sum(-1, keepdim=True)
        total = total + others * (drop / temperature).exp()
        return _Row(kept, peak, drop, others, total.log())

    def _divergence(self, teacher: TopK, row: _Row, log_q: Tensor) -> Tensor:
        log_p, rest = teacher.log_p.double(), teacher.rest.double()
        p = log_p.exp()
        value = torch.where(p == 0, 0, p * (log_p - log_q)).sum(1)
        log_rest = row.others.log() + row.drop / self.plan.temperature - row.log_total
        return value + torch.where(rest > 0, rest * (rest.log() - log_rest.squeeze(1)), 0)

    def _gradient_(
        self, student: Tensor, teacher: TopK, row: _Row, q: Tensor, inputs: RowInputs
    ) -> None:
        """Turn the exponentials of the ids not in K into the gradient of all ids."""
        plan = self.plan
        factor = inputs.kd_factor.double()[:, None]
        pull = factor
        if plan.with_ce and plan.temperature == 1.0:
            pull = pull + inputs.ce_factor.double()[:, None]
        # q of an id that is not in K is its exponential times `share`.
        share = (row.drop / plan.temperature - row.log_total).exp()
        rest = factor * teacher.rest.double()[:, None]
        slope = pull * share - rest / torch.where(row.others > 0, row.others, 1)
        student.mul_(slope.to(student.dtype))
        of_kept = torch.where(teacher.ids >= 0, pull * q - factor * teacher.log_p.double().exp(), 0)
        student.scatter_add_(1, teacher.ids.clamp(min=0), of_kept.to(student.dtype))

    def _hard_gradient_(self, gradient: Tensor, hard: Tensor | None, inputs: RowInputs) -> None:
        if not self.plan.with_ce or inputs.labels is None:
            return
        factor = inputs.ce_factor[:, None]
        if hard is not None:
            gradient.addcmul_(hard, factor / hard.sum(-1, keepdim=True))
        gradient.scatter_add_(1, inputs.labels[:, None], -factor)
