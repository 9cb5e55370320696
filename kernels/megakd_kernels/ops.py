"""Distillation losses as torch operators, for `torch.compile` and autograd.

`megakd::linear_kd` and `megakd::logits_kd` take flat arguments only. The public functions in
`linear_kd` and `logits` check, flatten and normalise; the operators form values and gradients.
"""

# No `from __future__ import annotations`: torch reads the operators' signatures.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.chunking import (
    ChunkPlan,
    gradient_dtype,
    logits_buffer,
    logits_buffers,
    masked_rows,
    plan_row_chunks,
    project_into,
    slices,
)
from megakd_kernels.formed import register_formed_gradients
from megakd_kernels.inputs import all_count, rows_to_keep
from megakd_kernels.linear_chunks import Needed, Side, StudentGradients, run_chunks
from megakd_kernels.row_plan import NO_BIASES, Biases, RowPlan, Warp
from megakd_kernels.row_terms import RowFactors, RowScorer, RowValues, row_kernel
from megakd_kernels.settings import formed_dtype, runs_kernels


class FlatPlan(NamedTuple):
    """A `RowPlan` and its implementation options, as arguments that an operator can take.

    divergences: names joined by commas; weights: the weight of each divergence.
    numbers: beta, skew, temperature, value_scale, then scale and softcap of student and teacher.
    shared, with_ce: as in `RowPlan`.
    """

    divergences: str
    weights: Sequence[float]
    numbers: Sequence[float]
    shared: int
    with_ce: bool
    implementation: str
    chunk_mb: float

    def unpack(self, *, with_teacher: bool, with_gradient: bool) -> RowPlan:
        """Build the plan of a row kernel."""
        beta, skew, temperature, value_scale, *warps = self.numbers
        names = self.divergences.split(",") if with_teacher else []
        return RowPlan(
            mixture=tuple(zip(names, self.weights, strict=False)),
            beta=beta,
            skew=skew,
            temperature=temperature,
            value_scale=value_scale,
            shared=self.shared,
            with_ce=self.with_ce,
            with_gradient=with_gradient,
            student_warp=Warp(*warps[:2]),
            teacher_warp=Warp(*warps[2:]),
        )


@torch.library.custom_op("megakd::linear_kd", mutates_args=())
def linear_kd(  # noqa: PLR0913, PLR0917, an operator takes flat arguments
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    valid: Tensor,
    labels: Tensor | None,
    kd_factor: Tensor,
    ce_factor: Tensor,
    needed: Sequence[bool],
    divergences: str,
    weights: Sequence[float],
    numbers: Sequence[float],
    shared: int,
    with_ce: bool,  # noqa: FBT001
    implementation: str,
    chunk_mb: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return total, divergences [n_div, N], ce, agrees [N]; gradients of hidden, weight, bias."""
    flat = FlatPlan(divergences, weights, numbers, shared, with_ce, implementation, chunk_mb)
    student = Side(student_hidden, student_weight, student_bias)
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Side(teacher_hidden, teacher_weight, teacher_bias).ids(shared)
    factors = RowFactors(valid=valid, labels=labels, kd=kd_factor, ce=ce_factor)
    (total, values, ce, agrees), formed = _linear(student, teacher, factors, flat, Needed(*needed))
    return total, values, ce, agrees, formed.hidden, formed.weight, formed.bias


def _linear(
    student: Side, teacher: Side | None, factors: RowFactors, flat: FlatPlan, needed: Needed
) -> tuple[RowValues, StudentGradients]:
    """Compute the loss; skip rows that do not count if reading the mask is free."""
    kept = rows_to_keep(factors.valid)
    if kept is None:
        return _linear_rows(student, teacher, factors, flat, needed)
    less = None if teacher is None else teacher.rows(kept)
    values, formed = _linear_rows(student.rows(kept), less, factors.rows(kept), flat, needed)
    return values.spread(kept, len(factors.valid)), formed.spread(kept, len(factors.valid))


def _linear_rows(
    student: Side, teacher: Side | None, factors: RowFactors, flat: FlatPlan, needed: Needed
) -> tuple[RowValues, StudentGradients]:
    dtype = factors.kd.dtype
    # Ids that only the student has matter only to cross-entropy.
    used = student.ids(len(student.weight) if flat.with_ce else flat.shared)
    formed = StudentGradients.empty(student, needed, dtype)
    plan = flat.unpack(with_teacher=teacher is not None, with_gradient=needed.any)
    widths = [len(used.weight)] + ([] if teacher is None else [len(teacher.weight)])
    sizes = _sizes(len(used.hidden), widths, used.hidden, factors.kd, flat)
    used, teacher, biases = _with_biases_of_rows(used, teacher, flat, dtype)
    kernel = row_kernel(
        flat.implementation, plan, block=sizes.block, like=factors.kd, biases=biases
    )
    scorer = RowScorer(kernel, plan, factors, sizes.block)
    buffers = logits_buffers(min(sizes.chunk, len(used.hidden)), widths, factors.kd)

    def score(rows: slice, logits: Tensor, gradient: Tensor | None) -> None:
        target = None
        if teacher is not None:
            target = buffers[1][: len(logits)]
            kept = masked_rows(teacher.hidden[rows], factors.valid[rows], dtype)
            project_into(target, kept, teacher.weight, teacher.bias)
        scorer.run_(rows, logits, target, gradient)

    run_chunks(used, score, formed, valid=factors.valid, plan=sizes, logits=buffers[0])
    formed.finish(len(used.weight))
    return scorer.values(), formed


def _with_biases_of_rows(
    student: Side, teacher: Side | None, flat: FlatPlan, dtype: torch.dtype
) -> tuple[Side, Side | None, Biases]:
    """Take the biases out of both models if the row kernel adds them as it reads the logits.

    A pass of their own would move 8 bytes a logit.
    """
    if not runs_kernels(flat.implementation, dtype):
        return student, teacher, NO_BIASES
    if teacher is None:
        return student._replace(bias=None), None, Biases(student.bias)
    biases = Biases(student.bias, teacher.bias)
    return student._replace(bias=None), teacher._replace(bias=None), biases


def _sizes(rows: int, widths: list[int], hidden: Tensor, like: Tensor, flat: FlatPlan) -> ChunkPlan:
    return plan_row_chunks(
        rows, widths=tuple(widths), like=like, gradient=gradient_dtype(hidden, like.dtype),
        chunk_mb=flat.chunk_mb, implementation=flat.implementation,
    )  # fmt: skip


@linear_kd.register_fake
def _(  # noqa: PLR0913, PLR0917, the signature of the operator
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None,
    teacher_hidden: Tensor | None, teacher_weight: Tensor | None, teacher_bias: Tensor | None,
    valid: Tensor, labels: Tensor | None, kd_factor: Tensor, ce_factor: Tensor,
    needed: Sequence[bool], divergences: str, *options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    del student_bias, teacher_weight, teacher_bias, labels, ce_factor, options
    formed = StudentGradients.empty(
        Side(student_hidden, student_weight, None), Needed(*needed), kd_factor.dtype
    )
    values = _empty_values(kd_factor, divergences, with_teacher=teacher_hidden is not None)
    return (*values, formed.hidden, formed.weight, formed.bias)


@torch.library.custom_op("megakd::logits_kd", mutates_args=())
def logits_kd(  # noqa: PLR0913, PLR0917, an operator takes flat arguments
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    valid: Tensor,
    labels: Tensor | None,
    kd_factor: Tensor,
    ce_factor: Tensor,
    needed: bool,  # noqa: FBT001
    divergences: str,
    weights: Sequence[float],
    numbers: Sequence[float],
    shared: int,
    with_ce: bool,  # noqa: FBT001
    implementation: str,
    chunk_mb: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return total, divergences [n_div, N], ce [N], agrees [N], gradient of the logits [N, V]."""
    flat = FlatPlan(divergences, weights, numbers, shared, with_ce, implementation, chunk_mb)
    factors = RowFactors(valid=valid, labels=labels, kd=kd_factor, ce=ce_factor)
    plan = flat.unpack(with_teacher=teacher_logits is not None, with_gradient=needed)
    soft = None if teacher_logits is None else teacher_logits[:, :shared]
    gradient = _gradient_of_logits(student_logits, kd_factor, implementation, needed=needed)
    in_triton = runs_kernels(implementation, kd_factor.dtype)
    score = _score_with_kernel if in_triton else _score_in_torch
    total, values, ce, agrees = score(student_logits, soft, factors, plan, flat, gradient).values()
    return total, values, ce, agrees, gradient


def _gradient_of_logits(
    student: Tensor, like: Tensor, implementation: str, *, needed: bool
) -> Tensor:
    """Return the buffer of the gradient [N, V], of shape [0] if none is needed."""
    dtype = formed_dtype(implementation, student.dtype, like.dtype)
    if not needed:
        return like.new_empty(0, dtype=dtype)
    return logits_buffer(len(student), student.shape[1], like, dtype)


def _score_with_kernel(
    student: Tensor,
    teacher: Tensor | None,
    factors: RowFactors,
    plan: RowPlan,
    flat: FlatPlan,
    gradient: Tensor,
) -> RowScorer:
    """Score all rows at once; the kernel reads the logits as they are."""
    count = len(student)
    given = [student] if teacher is None else [student, teacher]
    chunk = count
    if not all(map(_are_aligned, given)):
        chunk = _sizes(count, [each.shape[1] for each in given], student, factors.kd, flat).chunk
    kernel = row_kernel(flat.implementation, plan, block=chunk, like=factors.kd)
    scorer = RowScorer(kernel, plan, factors, max(chunk, 1))
    for rows in slices(count, max(chunk, 1)):
        soft = None if teacher is None else _aligned(teacher[rows])
        scorer.run_(rows, _aligned(student[rows]), soft, gradient[rows] if len(gradient) else None)
    return scorer


def _are_aligned(logits: Tensor) -> bool:
    """Return whether a thread may load 16 bytes at once, and columns are adjacent."""
    return logits.stride(1) == 1 and (
        logits.is_cpu or logits.stride(0) * logits.element_size() % 16 == 0
    )


def _aligned(logits: Tensor) -> Tensor:
    if _are_aligned(logits):
        return logits
    return logits_buffer(len(logits), logits.shape[1], logits).copy_(logits)


def _score_in_torch(
    student: Tensor,
    teacher: Tensor | None,
    factors: RowFactors,
    plan: RowPlan,
    flat: FlatPlan,
    gradient: Tensor,
) -> RowScorer:
    count, width = student.shape
    widths = [width] + ([] if teacher is None else [teacher.shape[1]])
    sizes = _sizes(count, widths, factors.kd, factors.kd, flat)
    kernel = row_kernel(flat.implementation, plan, block=sizes.block, like=factors.kd)
    scorer = RowScorer(kernel, plan, factors, sizes.block)
    # The loss works in place: in the gradient if it is needed, else in a buffer of one chunk.
    needed = plan.with_gradient
    work = gradient if needed else factors.kd.new_empty(min(sizes.chunk, count), width)
    is_masked = not all_count(factors.valid)
    for chunk in slices(count, sizes.chunk):
        target = work[chunk] if needed else work[: chunk.stop - chunk.start]
        target.copy_(student[chunk])
        soft = None if teacher is None else teacher[chunk].to(work.dtype, copy=True)
        if is_masked:
            out_of_use = ~factors.valid[chunk, None]
            target.masked_fill_(out_of_use, 0)
            soft = None if soft is None else soft.masked_fill_(out_of_use, 0)
        scorer.run_(chunk, target, soft, target if needed else None)
    return scorer


@logits_kd.register_fake
def _(  # noqa: PLR0913, PLR0917, the signature of the operator
    student_logits: Tensor, teacher_logits: Tensor | None, valid: Tensor, labels: Tensor | None,
    kd_factor: Tensor, ce_factor: Tensor, needed: bool, divergences: str,  # noqa: FBT001
    weights: Sequence[float], numbers: Sequence[float], shared: int, with_ce: bool,  # noqa: FBT001
    implementation: str, *options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    del labels, ce_factor, weights, numbers, shared, with_ce, options
    values = _empty_values(kd_factor, divergences, with_teacher=teacher_logits is not None)
    gradient = _gradient_of_logits(student_logits, kd_factor, implementation, needed=needed)
    return (*values, gradient)


def _empty_values(
    factor: Tensor, divergences: str, *, with_teacher: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kinds = len(divergences.split(",")) if with_teacher else 0
    return (
        factor.new_empty(()),
        factor.new_empty(kinds, len(factor)),
        torch.empty_like(factor),
        torch.empty_like(factor),
    )


register_formed_gradients(linear_kd, (0, 1, 2))
register_formed_gradients(logits_kd, (0,))
