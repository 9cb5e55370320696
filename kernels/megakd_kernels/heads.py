"""Checks and flattening of the LM heads of one or two models."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megakd_kernels.inputs import (
    Masks,
    Rows,
    check_constants,
    check_head,
    compute_dtype,
    select_rows,
    shared_vocabulary,
    under_autocast,
)
from megakd_kernels.linear_chunks import Side


class Heads(NamedTuple):
    """Both models; `shared` is the number of ids that both softmaxes run over."""

    student: Side
    teacher: Side | None
    shared: int

    def rows(self, masks: Masks, *, with_ids: bool) -> Rows:
        """Return the rows that count; without `with_ids`, labels only mark them."""
        student = self.student
        like = student.hidden.new_empty((), dtype=compute_dtype(*student, *(self.teacher or ())))
        ids = len(student.weight) if with_ids else None
        return select_rows(len(student.hidden), like=like, masks=masks, ids=ids)


def checked_heads(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None],
    vocab_size: int | None,
) -> Heads:
    """Return the heads of hidden states, weight and bias of both models.

    Raises:
        ValueError: only one of the teacher's hidden and weight is given, a teacher tensor requires
            grad, the rows of the models differ, `vocab_size` exceeds the vocabulary of a model, or
            see `check_head`.
    """
    side = checked_side("student", *student)
    hidden, weight, bias = teacher
    if hidden is None and weight is None:
        return Heads(side, None, len(side.weight))
    if hidden is None or weight is None:
        raise ValueError("teacher_hidden and teacher_weight must be given together")
    check_constants(teacher_hidden=hidden, teacher_weight=weight, teacher_bias=bias)
    other = checked_side("teacher", hidden, weight, bias)
    _check_same_rows(student[0], hidden)
    return Heads(side, other, shared_vocabulary(len(side.weight), len(other.weight), vocab_size))


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


def _check_same_rows(student: Tensor, teacher: Tensor) -> None:
    """Check that the hidden states [..., H] of both models have the same rows, or flat ones."""
    rows, others = student.shape[:-1], teacher.shape[:-1]
    is_flat = 1 in (len(rows), len(others)) and rows.numel() == others.numel()
    if not (rows == others or is_flat) or student.device != teacher.device:
        raise ValueError(
            f"student_hidden is {list(student.shape)} on {student.device} and teacher_hidden "
            f"{list(teacher.shape)} on {teacher.device}; only the last dimension may differ"
        )
