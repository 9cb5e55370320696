"""Losses between hidden states, through a learned projection where the widths differ.

Per chunk of rows: projection, residual or cosine, and its gradient, written over the
projection; nothing of size [N, Ht] survives the call.
Shapes: N rows (positions), C rows of a chunk, Hs and Ht widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megakd_kernels import reference
from megakd_kernels.chunking import (
    add_weight_gradient_,
    attach_gradients,
    input_gradient_into,
    masked_rows,
    narrow_gradient,
    plan_chunks,
    project_into,
    slices,
)
from megakd_kernels.settings import compute_dtype, resolve_implementation

SMALLEST_NORM = 1e-12
_CHUNK_MB = 64

RowLoss = Callable[[Tensor, Tensor], Tensor]


def hidden_mse_projection_loss(
    student_hidden: Tensor,
    projection: Tensor | None,
    teacher_hidden: Tensor,
    *,
    valid: Tensor | None,
    impl: str = "auto",
) -> Tensor:
    """Squared error between projected student and teacher states.

    Romero et al. 2015 (FitNets, equation 3) with a linear regressor; Jiao et al. 2020
    (TinyBERT, equation 9).

    Args:
        student_hidden: [..., Hs].
        projection: [Ht, Hs], applied as x @ P.T; None where the widths are equal.
        teacher_hidden: [..., Ht]; carries no gradient.
        valid: [...] bool, True at positions that count; None: all of them. The others may
            hold anything.
        impl: "chunked", "reference", or "auto", which MEGAKD_KERNELS overrides.

    Returns:
        Scalar: mean over the width, *sum* over the valid positions; computed in fp32 (fp64).

    Raises:
        ValueError: unknown impl, or shapes that do not fit.
    """
    inputs = _flatten(student_hidden, projection, teacher_hidden, valid)
    if resolve_implementation(impl) == "reference":
        return _reference(*inputs, reference.hidden_mse)
    return _chunked(*inputs, _squared_error_)


def hidden_cosine_projection_loss(
    student_hidden: Tensor,
    projection: Tensor | None,
    teacher_hidden: Tensor,
    *,
    valid: Tensor | None,
    impl: str = "auto",
) -> Tensor:
    """One minus the cosine between projected student and teacher states.

    Sanh et al. 2019 (DistilBERT, section 3).

    Args:
        student_hidden: [..., Hs].
        projection: [Ht, Hs], applied as x @ P.T; None where the widths are equal.
        teacher_hidden: [..., Ht]; carries no gradient.
        valid: [...] bool, True at positions that count; None: all of them. The others may
            hold anything.
        impl: "chunked", "reference", or "auto", which MEGAKD_KERNELS overrides.

    Returns:
        Scalar: *sum* over the valid positions; computed in fp32 (fp64). A vector shorter
        than 1e-12 has loss 1 and no gradient.

    Raises:
        ValueError: unknown impl, or shapes that do not fit.
    """
    inputs = _flatten(student_hidden, projection, teacher_hidden, valid)
    if resolve_implementation(impl) == "reference":
        return _reference(*inputs, _reference_cosine)
    return _chunked(*inputs, _one_minus_cosine_)


def _reference_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return reference.hidden_cosine(student, teacher, SMALLEST_NORM)


def _reference(
    student: Tensor, projection: Tensor | None, teacher: Tensor, valid: Tensor, loss: RowLoss
) -> Tensor:
    dtype = compute_dtype(student, projection, teacher)
    with torch.autocast(student.device.type, enabled=False):
        projected = student[valid].to(dtype)
        if projection is not None:
            projected = reference.project(projected, projection, None, dtype)
        return loss(projected, teacher[valid].to(dtype)).sum()


def _chunked(
    student: Tensor, projection: Tensor | None, teacher: Tensor, valid: Tensor, loss: RowLoss
) -> Tensor:
    dtype = compute_dtype(student, projection, teacher)
    has_input, has_projection = (_needs_gradient(tensor) for tensor in (student, projection))
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        total = student.new_zeros((), dtype=dtype)
        input_gradient = student.new_empty(student.shape, dtype=dtype) if has_input else None
        projection_gradient = None
        if has_projection and projection is not None:
            projection_gradient = projection.new_zeros(projection.shape, dtype=dtype)
        width = teacher.shape[1]
        plan = plan_chunks(
            len(student), widths=(student.shape[1], width, width), like=total, chunk_mb=_CHUNK_MB
        )
        for chunk in slices(len(student), plan.chunk):
            counted = valid[chunk]
            narrow = masked_rows(student[chunk], counted, dtype)
            work = _projected(narrow, projection, dtype)
            target = teacher[chunk].to(dtype).masked_fill(~counted[:, None], 0)
            total += torch.where(counted, loss(work, target), 0).sum()
            work.masked_fill_(~counted[:, None], 0)
            _add_gradients(work, narrow, projection, _part(input_gradient, chunk),
                           projection_gradient)  # fmt: skip
    inputs = (student,) if projection is None else (student, projection)
    gradients = (input_gradient, projection_gradient)[: len(inputs)]
    return attach_gradients(total, torch.ones_like(total), inputs, gradients)


def _projected(hidden: Tensor, projection: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A buffer [C, Ht] of its own, to be overwritten."""
    if projection is None:
        return hidden.to(dtype, copy=True)
    out = hidden.new_empty(len(hidden), len(projection), dtype=dtype)
    return project_into(out, hidden, projection, None)


def _add_gradients(
    gradient: Tensor,
    hidden: Tensor,
    projection: Tensor | None,
    input_gradient: Tensor | None,
    projection_gradient: Tensor | None,
) -> None:
    if projection is None:
        if input_gradient is not None:
            input_gradient.copy_(gradient)
        return
    narrow = narrow_gradient(gradient, hidden)
    if input_gradient is not None:
        input_gradient_into(input_gradient, narrow, projection)
    if projection_gradient is not None:
        add_weight_gradient_(projection_gradient, narrow, hidden, beta=1.0)


def _squared_error_(student: Tensor, teacher: Tensor) -> Tensor:
    """Values [C]; `student` becomes its own gradient 2 (z - y) / width, `teacher` is used up."""
    student.sub_(teacher)
    values = torch.mul(student, student, out=teacher).mean(-1)
    student.mul_(2.0 / student.shape[-1])
    return values


def _one_minus_cosine_(student: Tensor, teacher: Tensor) -> Tensor:
    """Values [C]; `student` becomes its own gradient (c z / |z| - y / |y|) / |z|."""
    inverse_norm = _inverse_norm(student)
    student.mul_(inverse_norm)
    teacher.mul_(_inverse_norm(teacher))
    cosine = (student * teacher).sum(-1, keepdim=True)
    student.mul_(cosine).sub_(teacher).mul_(inverse_norm)
    return 1 - cosine.squeeze(-1)


def _inverse_norm(vectors: Tensor) -> Tensor:
    square = vectors.square().sum(-1, keepdim=True)
    is_long = square > SMALLEST_NORM**2
    return torch.where(is_long, torch.where(is_long, square, 1).rsqrt(), 0)


def _flatten(
    student: Tensor, projection: Tensor | None, teacher: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_hidden is {list(student.shape)} and teacher_hidden "
            f"{list(teacher.shape)}; only the last dimension may differ"
        )
    _check_widths(student.shape[-1], projection, teacher.shape[-1])
    student = student.reshape(-1, student.shape[-1])
    teacher = teacher.detach().reshape(-1, teacher.shape[-1])
    if valid is None:
        valid = torch.ones(len(student), dtype=torch.bool, device=student.device)
    if valid.numel() != len(student):
        raise ValueError(f"valid has {valid.numel()} entries for {len(student)} positions")
    return student, projection, teacher, valid.reshape(-1).bool()


def _check_widths(student: int, projection: Tensor | None, teacher: int) -> None:
    if projection is None and student != teacher:
        raise ValueError(
            f"the student is {student} wide and the teacher {teacher}: a projection is needed"
        )
    if projection is not None and tuple(projection.shape) != (teacher, student):
        raise ValueError(
            f"projection is {list(projection.shape)}; a student {student} wide and a teacher "
            f"{teacher} wide need [{teacher}, {student}]"
        )


def _needs_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]
