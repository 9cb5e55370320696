"""Distillation from a cached teacher as a torch operator, for `torch.compile` and autograd.

`megakd::topk_kd` forms the student's logits chunk by chunk. `topk` checks, flattens and normalises.
Shapes: N rows, C rows of a chunk, V vocabulary, H width, k ids kept.
"""

# No `from __future__ import annotations`: torch reads the operator's signature.

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megakd_kernels.chunking import (
    ChunkPlan,
    gradient_dtype,
    logits_buffers,
    plan_row_chunks,
)
from megakd_kernels.formed import register_formed_gradients
from megakd_kernels.inputs import rows_to_keep
from megakd_kernels.linear_chunks import Needed, Side, StudentGradients, run_chunks
from megakd_kernels.row_plan import Scratch
from megakd_kernels.row_terms import RowFactors, RowValues, block_of, row_blocks
from megakd_kernels.row_topk import TopK, TopKPlan, TopKRows
from megakd_kernels.settings import runs_kernels

if TYPE_CHECKING:
    from megakd_kernels.triton.row_topk import TritonTopKRows


@torch.library.custom_op("megakd::topk_kd", mutates_args=())
def topk_kd(  # noqa: PLR0913, PLR0917, an operator takes flat arguments
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    ids: Tensor,
    log_p: Tensor,
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
    implementation: str,
    chunk_mb: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return total, divergence [1, N], ce [N], agrees [N], gradients of hidden, weight, bias."""
    student = Side(student_hidden, student_weight, student_bias)
    teacher = TopK(ids, log_p, rest, best)
    factors = RowFactors(valid=valid, labels=labels, kd=kd_factor, ce=ce_factor)
    wanted = Needed(*needed)
    plan = TopKPlan(
        temperature=temperature, value_scale=value_scale, with_ce=with_ce,
        with_gradient=wanted.any,
    )  # fmt: skip
    kept = rows_to_keep(valid)
    if kept is not None:
        student, teacher, factors = student.rows(kept), teacher.rows(kept), factors.rows(kept)
    sizes = plan_row_chunks(
        len(student.hidden), widths=(len(student.weight),), like=factors.kd,
        gradient=gradient_dtype(student.hidden, factors.kd.dtype),
        chunk_mb=chunk_mb, implementation=implementation,
    )  # fmt: skip
    formed = StudentGradients.empty(student, wanted, factors.kd.dtype)
    kernel = TopKRows(plan=plan, scratch=Scratch(sizes.block, factors.kd))
    if runs_kernels(implementation, factors.kd.dtype):
        # Imported here because the package also works without Triton.
        from megakd_kernels.triton.row_topk import TritonTopKRows

        # The kernel adds the bias as it reads the logits.
        kernel, student = TritonTopKRows(plan=plan, bias=student.bias), student._replace(bias=None)
    values = _score(student, teacher, factors, kernel, sizes, formed)
    if kept is not None:
        values, formed = values.spread(kept, len(valid)), formed.spread(kept, len(valid))
    total, divergences, ce, agrees = values
    return total, divergences, ce, agrees, formed.hidden, formed.weight, formed.bias


@topk_kd.register_fake
def _(  # noqa: PLR0913, PLR0917, the signature of the operator
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None,
    ids: Tensor, log_p: Tensor, rest: Tensor, best: Tensor, valid: Tensor,
    labels: Tensor | None, kd_factor: Tensor, ce_factor: Tensor, needed: Sequence[bool],
    *options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    del student_bias, ids, log_p, rest, best, labels, options
    formed = StudentGradients.empty(
        Side(student_hidden, student_weight, None), Needed(*needed), kd_factor.dtype
    )
    return (
        kd_factor.new_empty(()), kd_factor.new_empty(1, len(kd_factor)),
        torch.empty_like(ce_factor), torch.empty_like(ce_factor),
        formed.hidden, formed.weight, formed.bias,
    )  # fmt: skip


def _score(
    student: Side,
    teacher: TopK,
    factors: RowFactors,
    kernel: "TopKRows | TritonTopKRows",
    sizes: ChunkPlan,
    formed: StudentGradients,
) -> RowValues:
    """Return the values of all rows and their total; form the gradients chunk by chunk."""
    count, ids = len(student.hidden), len(student.weight)
    slope = kernel.plan.value_scale / kernel.plan.temperature
    divergence, ce = torch.zeros_like(factors.kd), torch.zeros_like(factors.kd)
    agrees = torch.zeros_like(factors.kd)

    def score(rows: slice, logits: Tensor, gradient: Tensor | None) -> None:
        for part, here in row_blocks(rows, sizes.block):
            block, out = block_of(logits, gradient, part)
            terms = kernel.run_(block, teacher.rows(here), factors.inputs(here, slope), out)
            # Rounding may give -1e-7 if the exact value is 0 or slightly above 0.
            divergence[here] = terms.divergences[0].clamp(min=0.0)
            ce[here], agrees[here] = terms.ce, terms.agrees

    (logits,) = logits_buffers(min(sizes.chunk, count), [ids], factors.kd)
    run_chunks(student, score, formed, valid=factors.valid, plan=sizes, logits=logits)
    formed.finish(ids)
    return factors.values([1.0], divergence[None], ce, agrees)


register_formed_gradients(topk_kd, (0, 1, 2))
