"""Losses between hidden states, through a learned projection where the widths differ.

This module checks and flattens; `hidden_ops` forms values and gradients chunk by chunk, and
nothing of size [N, Ht] survives the call.
Shapes: N rows (positions), Hs and Ht widths of student and teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd_kernels import formed, hidden_ops, reference
from megakd_kernels.hidden_ops import inverse_norm
from megakd_kernels.inputs import (
    all_count,
    check_constants,
    check_not_sharded,
    check_rows,
    compute_dtype,
    needs_gradient,
    under_autocast,
    without_autocast,
)
from megakd_kernels.settings import is_small, resolve_implementation


class _Inputs(NamedTuple):
    """Inputs: student [N, Hs], projection [Ht, Hs] or None, teacher [N, Ht], valid [N] bool."""

    student: Tensor
    projection: Tensor | None
    teacher: Tensor
    valid: Tensor


def hidden_mse_projection_loss(
    student_hidden: Tensor,
    projection: Tensor | None,
    teacher_hidden: Tensor,
    *,
    valid: Tensor | None,
    impl: str = "auto",
) -> Tensor:
    """Return the squared error between projected student and teacher states.

    Romero et al. 2015 (FitNets, equation 3) with a linear regressor; Jiao et al. 2020
    (TinyBERT, equation 9).

    Args:
        student_hidden: [..., Hs].
        projection: [Ht, Hs], applied as x @ P.T; None if the widths are equal.
        teacher_hidden: [..., Ht]; carries no gradient.
        valid: [...] bool, True at positions that count; None: all positions count. Other
            positions may hold anything.
        impl: "triton", "chunked", "reference", or "auto", which MEGAKD_KERNELS overrides.

    Returns:
        Scalar: mean over the width, *sum* over the valid positions; computed in fp32 (fp64).

    Raises:
        ValueError: unknown impl, or shapes that do not fit.
    """
    inputs = _flatten(student_hidden, projection, teacher_hidden, valid)
    return _loss("mse", inputs, impl)


def hidden_cosine_projection_loss(
    student_hidden: Tensor,
    projection: Tensor | None,
    teacher_hidden: Tensor,
    *,
    valid: Tensor | None,
    impl: str = "auto",
) -> Tensor:
    """Return one minus the cosine between projected student and teacher states.

    Sanh et al. 2019 (DistilBERT, section 3).

    Args:
        student_hidden: [..., Hs].
        projection: [Ht, Hs], applied as x @ P.T; None if the widths are equal.
        teacher_hidden: [..., Ht]; carries no gradient.
        valid: [...] bool, True at positions that count; None: all positions count. Other
            positions may hold anything.
        impl: "triton", "chunked", "reference", or "auto", which MEGAKD_KERNELS overrides.

    Returns:
        Scalar: *sum* over the valid positions; computed in fp32 (fp64). A vector shorter
        than 1e-12 has loss 1 and no gradient.

    Raises:
        ValueError: unknown impl, or shapes that do not fit.
    """
    inputs = _flatten(student_hidden, projection, teacher_hidden, valid)
    return _loss("cosine", inputs, impl)


def _loss(kind: str, inputs: _Inputs, impl: str) -> Tensor:
    implementation = resolve_implementation(impl, inputs.student.device)
    with without_autocast(inputs.student.device):
        if implementation == "reference" or is_small(impl, *inputs):
            return _reference(kind, inputs)
        needed = [needs_gradient(inputs.student), needs_gradient(inputs.projection)]
        return formed.run(hidden_ops.hidden_loss, *inputs, needed, kind, implementation)[0]


def _reference(kind: str, inputs: _Inputs) -> Tensor:
    student, projection, teacher, valid = inputs
    dtype = compute_dtype(student, projection, teacher)
    if not all_count(valid):
        student, teacher = student[valid], teacher[valid]
    projected, target = student.to(dtype), teacher.to(dtype)
    if projection is not None:
        projected = reference.project(projected, projection, None, dtype)
    if kind == "mse":
        return F.mse_loss(projected, target, reduction="sum") / target.shape[-1]
    units = [states * inverse_norm(states) for states in (projected, target)]
    return (1 - (units[0] * units[1]).sum(-1)).sum()


def _flatten(
    student: Tensor, projection: Tensor | None, teacher: Tensor, valid: Tensor | None
) -> _Inputs:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_hidden is {list(student.shape)} and teacher_hidden "
            f"{list(teacher.shape)}; only the last dimension may differ"
        )
    check_not_sharded("projection", projection)
    check_constants(teacher_hidden=teacher)
    check_rows(student.shape[:-1], valid=valid)
    _check_widths(student.shape[-1], projection, teacher.shape[-1])
    student, teacher = (each.reshape(-1, each.shape[-1]) for each in (student, teacher))
    if valid is None:
        valid = torch.ones(len(student), dtype=torch.bool, device=student.device)
    if projection is not None:
        student, projection = under_autocast(student), under_autocast(projection)
    return _Inputs(student, projection, teacher, valid.reshape(-1).bool())


def _check_widths(student: int, projection: Tensor | None, teacher: int) -> None:
    if projection is None and student != teacher:
        raise ValueError(
            f"the student is {student} wide and the teacher {teacher}; pass a projection"
        )
    if projection is not None and tuple(projection.shape) != (teacher, student):
        raise ValueError(
            f"projection is {list(projection.shape)}; a student {student} wide and a teacher "
            f"{teacher} wide need [{teacher}, {student}]"
        )
