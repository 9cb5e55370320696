"""Operator of the hidden-state losses: values, and gradients formed in the forward.

For each chunk of rows the operator computes the projection, the residual or cosine, and its
gradient. Row kernels need no chunks where there is no projection.
Shapes: N rows, C rows of a chunk, Hs and Ht widths of student and teacher.
"""

# No `from __future__ import annotations`: torch reads the operator's signature.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd_kernels.chunking import (
    add_weight_gradient_,
    gradient_dtype,
    input_gradient_into,
    masked_rows,
    plan_chunks,
    plan_fused_chunks,
    project_into,
    slices,
)
from megakd_kernels.formed import register_formed_gradients
from megakd_kernels.inputs import all_count, compute_dtype
from megakd_kernels.settings import formed_dtype, runs_kernels

SMALLEST_NORM = 1e-12
CHUNK_MB = 64
# Buffers of the kernels with a projection: 16384 rows of 4096 states in bf16.
KERNEL_CHUNK_MB = 512


@torch.library.custom_op("megakd::hidden_loss", mutates_args=())
def hidden_loss(
    student: Tensor,
    projection: Tensor | None,
    teacher: Tensor,
    valid: Tensor,
    needed: Sequence[bool],
    kind: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum over valid rows, and gradients of student [N, Hs], projection [Ht, Hs]."""
    formed = _Formed.empty(student, projection, teacher, needed, implementation)
    add_up = _sum_with_kernels if runs_kernels(implementation, formed.dtype) else _sum_in_chunks
    total = add_up(student, projection, teacher, valid, kind=kind, formed=formed)
    return total, formed.student, formed.projection


def _sum_with_kernels(
    student: Tensor,
    projection: Tensor | None,
    teacher: Tensor,
    valid: Tensor,
    *,
    kind: str,
    formed: "_Formed",
) -> Tensor:
    """Return the sum of the loss; the kernels read and write the dtypes of the models."""
    # Imported here because the package also works without Triton.
    from megakd_kernels.triton import row_hidden

    loss = row_hidden.squared_error_rows if kind == "mse" else row_hidden.one_minus_cosine_rows
    student, teacher = _adjacent(student), _adjacent(teacher)
    if projection is None:
        out = formed.student if formed.student.numel() else None
        return loss(student, teacher, valid, out).sum()
    count, width = teacher.shape
    total = student.new_zeros((), dtype=formed.dtype)
    narrow = gradient_dtype(student, formed.dtype)
    chunk = plan_fused_chunks(
        count, widths=(width,), like=total, gradient=narrow, chunk_mb=KERNEL_CHUNK_MB
    ).chunk
    projected = total.new_empty(chunk, width)
    gradient = (
        projected if narrow == projected.dtype else projected.new_empty(chunk, width, dtype=narrow)
    )
    for rows in slices(count, chunk):
        hidden = masked_rows(student[rows], valid[rows], formed.dtype)
        out = gradient[: len(hidden)] if formed.is_needed else None
        work = project_into(projected[: len(hidden)], hidden, projection, None)
        total += loss(work, teacher[rows], valid[rows], out).sum()
        if out is not None:
            formed.add(rows, out, hidden, projection)
    return total


def _sum_in_chunks(
    student: Tensor,
    projection: Tensor | None,
    teacher: Tensor,
    valid: Tensor,
    *,
    kind: str,
    formed: "_Formed",
) -> Tensor:
    """Return the sum of the loss in torch, whose intermediate results fit the caches."""
    dtype, width = formed.dtype, teacher.shape[1]
    total = student.new_zeros((), dtype=dtype)
    plan = plan_chunks(
        len(student), widths=(student.shape[1], width, width), like=total, chunk_mb=CHUNK_MB
    )
    for rows in slices(len(student), plan.chunk):
        counted, target = valid[rows], teacher[rows].to(dtype)
        if kind == "mse" and projection is None:
            out = formed.student[rows] if formed.student.numel() else None
            total += _squared_difference(student[rows].to(dtype), target, counted, out)
            continue
        hidden = masked_rows(student[rows], counted, dtype)
        work = _projected(hidden, projection, dtype)
        if kind == "mse":
            total += _squared_difference(work, target, counted, work)
        else:
            target = target.masked_fill(~counted[:, None], 0)
            total += _one_minus_cosine_(work, target, counted).sum()
        formed.add(rows, work, hidden, projection)
    return total


@dataclass(kw_only=True)
class _Formed:
    """Gradients, of shape [0] if they are not requested.

    dtype: the compute dtype, which the projection's gradient has; see `formed_dtype`.
    """

    student: Tensor
    projection: Tensor
    dtype: torch.dtype

    @classmethod
    def empty(
        cls,
        student: Tensor,
        projection: Tensor | None,
        teacher: Tensor,
        needed: Sequence[bool],
        implementation: str,
    ) -> "_Formed":
        dtype = compute_dtype(student, projection, teacher)
        student_dtype = dtype
        if projection is None or projection.dtype == student.dtype:
            student_dtype = formed_dtype(implementation, student.dtype, dtype)
        shape = projection.shape if projection is not None and needed[1] else torch.Size([0])
        return cls(
            student=student.new_empty(student.shape if needed[0] else 0, dtype=student_dtype),
            projection=student.new_zeros(shape, dtype=dtype),
            dtype=dtype,
        )

    @property
    def is_needed(self) -> bool:
        return self.student.numel() > 0 or self.projection.numel() > 0

    def add(self, rows: slice, gradient: Tensor, hidden: Tensor, projection: Tensor | None) -> None:
        """Add the gradient [C, Ht] with respect to the projected states of some rows."""
        if projection is None:
            if self.student.numel():
                self.student[rows] = gradient
            return
        narrow = gradient.to(gradient_dtype(hidden, gradient.dtype))
        if self.student.numel():
            input_gradient_into(self.student[rows], narrow, projection)
        if self.projection.numel():
            add_weight_gradient_(self.projection, narrow, hidden)


@hidden_loss.register_fake
def _(
    student: Tensor, projection: Tensor | None, teacher: Tensor, valid: Tensor,
    needed: Sequence[bool], kind: str, implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    del valid, kind
    formed = _Formed.empty(student, projection, teacher, needed, implementation)
    return student.new_empty((), dtype=formed.dtype), formed.student, formed.projection


register_formed_gradients(hidden_loss, (0, 1))


def _projected(hidden: Tensor, projection: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the projected states in a new buffer [C, Ht] that may be overwritten."""
    if projection is None:
        return hidden.to(dtype, copy=True)
    out = hidden.new_empty(len(hidden), len(projection), dtype=dtype)
    return project_into(out, hidden, projection, None)


def _adjacent(rows: Tensor) -> Tensor:
    """Return rows whose columns are adjacent in memory, as the kernels read them."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _squared_difference(
    student: Tensor, teacher: Tensor, valid: Tensor, out: Tensor | None
) -> Tensor:
    """Return the sum over rows; `out`, possibly `student`, becomes the gradient 2 (z - y) / width.

    States without a projection occur for every layer and sub-network, so nothing is copied.
    Padding may hold anything: it is masked in the difference.
    """
    difference = torch.sub(student, teacher, out=out)
    if not all_count(valid):
        difference.masked_fill_(~valid[:, None], 0)
    width = student.shape[-1]
    value = torch.linalg.vector_norm(difference, dim=-1).square().sum() / width
    if out is not None:
        out.mul_(2.0 / width)
    return value


def _one_minus_cosine_(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Return values [C]; `student` becomes the gradient (c z / |z| - y / |y|) / |z|.

    `teacher` is lost.
    """
    scale = inverse_norm(student)
    student.mul_(scale)
    teacher.mul_(inverse_norm(teacher))
    cosine = (student * teacher).sum(-1, keepdim=True)
    student.mul_(cosine).sub_(teacher).mul_(scale)
    return torch.where(valid, 1 - cosine.squeeze(-1), 0)


def inverse_norm(vectors: Tensor) -> Tensor:
    """Return [..., 1]: 1 / |v|, or 0 for a vector shorter than 1e-12, whose cosine is then 0."""
    square = vectors.square().sum(-1, keepdim=True)
    is_long = square > SMALLEST_NORM**2
    return torch.where(is_long, torch.where(is_long, square, 1).rsqrt(), 0)
