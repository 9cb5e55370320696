"""Distillation from a cached teacher as a torch operator, for `torch.compile` and autograd.

`megakd::topk_kd` forms the student's logits chunk by chunk, or only the logits of the cached ids,
which are N k dot products. `topk` checks, flattens and normalises.
Shapes: N rows, C rows of a chunk, V vocabulary, H width, k ids kept.
"""

# No `from __future__ import annotations`: torch reads the operator's signature.

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megakd_kernels.chunking import (
    chunk_budget_on,
    gradient_dtype,
    logits_buffers,
    masked_rows,
    plan_chunks,
    plan_row_chunks,
    slices,
)
from megakd_kernels.formed import register_formed_gradients
from megakd_kernels.inputs import rows_to_keep
from megakd_kernels.linear_chunks import Needed, Side, StudentGradients, run_chunks
from megakd_kernels.row_plan import RowTerms, Scratch
from megakd_kernels.row_terms import RowFactors, RowValues, block_of, row_blocks
from megakd_kernels.row_topk import TopK, TopKPlan, TopKRows
from megakd_kernels.settings import runs_kernels


@torch.library.custom_op("megakd::topk_kd", mutates_args=())
def topk_kd(  # noqa: PLR0913, PLR0917, an operator takes flat arguments
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    ids: Tensor,
    log_p: Tensor,
    mass: Tensor,
    rest: Tensor,
    best: Tensor,
    valid: Tensor,
    labels: Tensor | None,
    kd_factor: Tensor,
    ce_factor: Tensor,
    needed: Sequence[bool],
    temperature: float,
    value_scale: float,
    with_ce: bool,  # noqa: FBT001
    within_ids: bool,  # noqa: FBT001
    implementation: str,
    chunk_mb: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return total, divergence [1, N], ce [N], agrees [N], gradients of hidden, weight, bias.

    within_ids: the student's softmax runs only over the cached ids.
    """
    student = Side(student_hidden, student_weight, student_bias)
    teacher = TopK(ids, log_p, mass, rest, best)
    factors = RowFactors(valid=valid, labels=labels, kd=kd_factor, ce=ce_factor)
    wanted = Needed(*needed)
    plan = TopKPlan(
        temperature=temperature, value_scale=value_scale, with_ce=with_ce,
        with_gradient=wanted.any,
    )  # fmt: skip
    kept = rows_to_keep(valid)
    if kept is not None:
        student, teacher, factors = student.rows(kept), teacher.rows(kept), factors.rows(kept)
    run = _Run(student, teacher, factors, plan, wanted)
    budget = chunk_budget_on(student.hidden.device, chunk_mb)
    if within_ids:
        run.over_ids(budget)
    else:
        run.over_vocabulary(implementation, budget)
    values, formed = run.values(), run.formed
    if kept is not None:
        values, formed = values.spread(kept, len(valid)), formed.spread(kept, len(valid))
    return (
        values.total, values.divergences, values.ce, values.agrees,
        formed.hidden, formed.weight, formed.bias,
    )  # fmt: skip


@topk_kd.register_fake
def _(  # noqa: PLR0913, PLR0917, the signature of the operator
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None,
    ids: Tensor, log_p: Tensor, mass: Tensor, rest: Tensor, best: Tensor, valid: Tensor,
    labels: Tensor | None, kd_factor: Tensor, ce_factor: Tensor, needed: Sequence[bool],
    *options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    del student_bias, ids, log_p, mass, rest, best, labels, options
    formed = StudentGradients.empty(
        Side(student_hidden, student_weight, None), Needed(*needed), kd_factor.dtype
    )
    return (
        kd_factor.new_empty(()), kd_factor.new_empty(1, len(kd_factor)),
        torch.empty_like(ce_factor), torch.empty_like(valid),
        formed.hidden, formed.weight, formed.bias,
    )  # fmt: skip


class _Run:
    """Values and formed gradients of one call, filled chunk by chunk."""

    def __init__(
        self, student: Side, teacher: TopK, factors: RowFactors, plan: TopKPlan, needed: Needed
    ) -> None:
        self._student, self._teacher, self._factors = student, teacher, factors
        self._plan = plan
        self.formed = StudentGradients.empty(student, needed, factors.kd.dtype)
        self._divergence = torch.zeros_like(factors.kd)
        # Lower bound from the log-sum inequality, which rounding may violate. It is 0 except for
        # "truncated".
        mass = teacher.mass.clamp(max=1.0)
        self._least = torch.xlogy(mass, mass) * plan.value_scale
        self._ce = torch.zeros_like(factors.kd)
        self._agrees = torch.zeros_like(factors.valid)

    def over_vocabulary(self, implementation: str, chunk_mb: float) -> None:
        """Run with the student's softmax over all of its ids."""
        ids = len(self._student.weight)
        like = self._factors.kd
        sizes = plan_row_chunks(
            len(self._student.hidden), widths=(ids,), like=like, chunk_mb=chunk_mb,
            gradient=gradient_dtype(self._student.hidden, like.dtype),
            implementation=implementation,
        )  # fmt: skip
        student = self._student
        kernel = TopKRows(plan=self._plan, scratch=Scratch(sizes.block, like))
        if runs_kernels(implementation, like.dtype):
            # Imported here because the package also works without Triton.
            from megakd_kernels.triton.row_topk import TritonTopKRows

            # The kernel adds the bias as it reads the logits.
            kernel = TritonTopKRows(plan=self._plan, bias=student.bias)
            student = student._replace(bias=None)
        slope = self._plan.value_scale / self._plan.temperature

        def score(rows: slice, logits: Tensor, gradient: Tensor | None) -> None:
            for part, here in row_blocks(rows, sizes.block):
                block, out = block_of(logits, gradient, part)
                inputs = self._factors.inputs(here, slope)
                self._store(here, kernel.run_(block, self._teacher.rows(here), inputs, out))

        (logits,) = logits_buffers(min(sizes.chunk, len(self._student.hidden)), [ids], like)
        valid = self._factors.valid
        run_chunks(student, score, self.formed, valid=valid, plan=sizes, logits=logits)
        self.formed.finish(ids)

    def over_ids(self, chunk_mb: float) -> None:
        """Run with the softmax over the cached ids, without a product with the whole weight."""
        formed = self.formed
        formed.weight.zero_()
        width = self._student.weight.shape[1]
        count, kept = self._teacher.ids.shape
        widths = (kept * width, kept * width)
        like = self._factors.kd
        sizes = plan_chunks(count, widths=widths, like=like, chunk_mb=chunk_mb)
        for rows in slices(count, sizes.chunk):
            teacher = self._teacher.rows(rows)
            index = teacher.ids.clamp(min=0)
            valid = self._factors.valid[rows]
            hidden = masked_rows(self._student.hidden[rows], valid, like.dtype).to(like.dtype)
            chosen = self._student.weight[index].to(like.dtype)  # [C, k, H]
            logits = torch.bmm(chosen, hidden[:, :, None]).squeeze(2)
            if self._student.bias is not None:
                logits += self._student.bias[index].to(like.dtype)
            change = self._score_ids(rows, teacher, logits.masked_fill(teacher.ids < 0, -math.inf))
            if formed.hidden.numel():
                formed.hidden[rows] = torch.bmm(change[:, None], chosen).squeeze(1)
            if formed.weight.numel():
                torch.mul(change[:, :, None], hidden[:, None], out=chosen)
                formed.weight.index_add_(0, index.flatten(), chosen.flatten(0, 1))
            if formed.bias.numel():
                formed.bias.index_add_(0, index.flatten(), change.flatten())

    def _score_ids(self, rows: slice, teacher: TopK, logits: Tensor) -> Tensor:
        """Store the values of some rows and return the gradient [C, k] of their logits."""
        plan = self._plan
        log_q = (logits.double() / plan.temperature).log_softmax(-1)
        log_p = teacher.log_p.double()
        p = log_p.exp()
        divergence = torch.where(p == 0, 0, p * (log_p - log_q)).sum(1)
        best = logits.masked_fill(teacher.ids != teacher.best[:, None], -math.inf)
        agrees = (teacher.best >= 0) & (best.amax(1) == logits.amax(1))
        divergence = divergence.to(logits.dtype) * plan.value_scale
        self._store(rows, RowTerms(divergence[None], torch.zeros_like(divergence), agrees))
        factor = self._factors.kd[rows, None] * (plan.value_scale / plan.temperature)
        change = factor * (teacher.mass.double()[:, None] * log_q.exp() - p)
        return torch.where(teacher.ids >= 0, change, 0).to(logits.dtype)

    def _store(self, rows: slice, terms: RowTerms) -> None:
        self._divergence[rows] = torch.maximum(terms.divergences[0], self._least[rows])
        self._ce[rows] = terms.ce
        self._agrees[rows] = terms.agrees

    def values(self) -> RowValues:
        """Return the values of all rows and their total."""
        return self._factors.values([1.0], self._divergence[None], self._ce, self._agrees)


register_formed_gradients(topk_kd, (0, 1, 2))
