"""Checks and flattening of the LM heads of one or two models."""

from __future__ import annotations

import torch
from torch import Tensor

from megakd_kernels.inputs import check_constants, check_head, compute_dtype, under_autocast
from megakd_kernels.linear_chunks import Side


def checked_side(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Side:
    """Return the head with its hidden states [..., H] as rows [N, H].

    Under autocast the tensors are cast to autocast's dtype.

    Raises:
        ValueError: see `check_head`.
    """
    check_head(name, hidden, weight, bias)
    flat = hidden.reshape(-1, hidden.shape[-1])
    bias = None if bias is None else under_autocast(bias)
    return Side(under_autocast(flat), under_autocast(weight), bias)


def checked_teacher(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Side | None:
    """Return the teacher's head, or None if there is no teacher.

    Raises:
        ValueError: only one of hidden and weight is given, a teacher tensor requires grad, or
            see `check_head`.
    """
    if hidden is None and weight is None:
        return None
    if hidden is None or weight is None:
        raise ValueError("teacher_hidden and teacher_weight must be given together")
    check_constants(teacher_hidden=hidden, teacher_weight=weight, teacher_bias=bias)
    return checked_side("teacher", hidden, weight, bias)


def check_same_rows(student: Tensor, teacher: Tensor | None) -> None:
    """Check that the hidden states [..., H] of both models have the same rows, or flat ones.

    Raises:
        ValueError: other leading dimensions, or another device.
    """
    if teacher is None:
        return
    rows, others = student.shape[:-1], teacher.shape[:-1]
    is_flat = 1 in (len(rows), len(others)) and rows.numel() == others.numel()
    if not (rows == others or is_flat) or student.device != teacher.device:
        raise ValueError(
            f"student_hidden is {list(student.shape)} on {student.device} and teacher_hidden "
            f"{list(teacher.shape)} on {teacher.device}; only the last dimension may differ"
        )


def heads_dtype(student: Side, teacher: Side | None) -> torch.dtype:
    """Return the dtype in which both heads are computed."""
    return compute_dtype(*student, *(teacher or ()))
