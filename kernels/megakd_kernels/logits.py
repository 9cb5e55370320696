"""Distillation loss from logits that exist already: classes, or a small vocabulary.

Shapes: N rows (examples or positions), V classes or vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megakd_kernels import reference
from megakd_kernels.chunking import attach_gradients, plan_chunks, slices
from megakd_kernels.row_terms import RowTotals, TermRows
from megakd_kernels.settings import (
    Divergence,
    KDOutput,
    Number,
    Objective,
    Rows,
    compute_dtype,
    resolve_implementation,
    select_rows,
    shared_vocabulary,
)


def kd_loss_from_logits(  # noqa: PLR0913, the public contract: options are keyword-only
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    t_squared: bool,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_items: Number | None = None,
    reduction: str = "sum",
    valid: Tensor | None = None,
    chunk_mb: float = 1024,
    impl: str = "auto",
) -> KDOutput:
    """`linear_kd_loss` for logits: divergences and cross-entropy in nats; same options.

    With `valid` the divergences run over the valid rows, labelled or not, and cross-entropy
    over those of them that carry a label. Without it a row without a label does not count.

    Args:
        student_logits: [..., Vs], such as [B, C] of a classifier.
        teacher_logits: [..., Vt], or None for cross-entropy alone; carries no gradient.
        labels: [...] int64, ignore_index where there is none.
        divergence: forward_kl, reverse_kl, jsd, or a mapping of these to weights.
        beta: of jsd, in [0, 1].
        temperature: above 0; cross-entropy runs at 1.
        t_squared: multiply divergences (value and gradient) by temperature^2.
        kd_weight: factor of the divergences; number or 0-d tensor.
        ce_weight: factor of cross-entropy; number or 0-d tensor. The number 0 skips it.
        token_weight: [...]; rows of weight 0 do not count and may hold anything.
        ignore_index: label of unlabelled rows.
        vocab_size: ids both softmaxes run over; None is min(Vs, Vt).
        num_items: divisor of reduction "num_items"; number or 0-d tensor.
        reduction: "sum"; "mean" over the valid rows; "num_items"; "none": [...], only
            without gradient.
        valid: [...] bool; rows that are False may hold anything.
        chunk_mb: budget of the chunk buffers in MiB (less is used on a CPU).
        impl: "chunked", "reference", or "auto", which MEGAKD_KERNELS overrides.

    Returns:
        KDOutput; n_valid counts the rows of the divergences.

    Raises:
        ValueError: unknown name, option out of range, shapes that do not fit, or reduction
            "none" while a gradient is needed.
    """
    objective = Objective(
        divergence=divergence, beta=beta, temperature=temperature, t_squared=t_squared,
        kd_weight=kd_weight, ce_weight=ce_weight, reduction=reduction, num_items=num_items,
        chunk_mb=chunk_mb,
    )  # fmt: skip
    needs_grad = student_logits.requires_grad and torch.is_grad_enabled()
    objective.check_inputs(
        has_teacher=teacher_logits is not None,
        has_labels=labels is not None,
        needs_grad=needs_grad,
    )
    student, teacher, shared = _flatten(student_logits, teacher_logits, vocab_size)
    like = torch.empty((), dtype=compute_dtype(student, teacher), device=student.device)
    rows = select_rows(
        len(student),
        like=like,
        labels=labels,
        token_weight=token_weight,
        ignore_index=ignore_index,
        valid=valid,
    )
    path = _chunked if resolve_implementation(impl) == "chunked" else reference.kd_loss
    with torch.autocast(student.device.type, enabled=False):
        output = path(student, teacher, rows, objective, shared)
    if reduction == "none":
        return output._replace(loss=output.loss.reshape(student_logits.shape[:-1]))
    return output


def _flatten(
    student: Tensor, teacher: Tensor | None, vocab_size: int | None
) -> tuple[Tensor, Tensor | None, int]:
    flat = student.reshape(-1, student.shape[-1])
    if teacher is None:
        return flat, None, student.shape[-1]
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"student_logits are {list(student.shape)} and teacher_logits "
            f"{list(teacher.shape)}; only the last dimension may differ"
        )
    shared = shared_vocabulary(student.shape[-1], teacher.shape[-1], vocab_size)
    return flat, teacher.detach().reshape(-1, teacher.shape[-1]), shared


def _chunked(
    student: Tensor, teacher: Tensor | None, rows: Rows, objective: Objective, shared: int
) -> KDOutput:
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        totals = RowTotals(rows, objective, with_teacher=teacher is not None)
        gradient = _form(student, teacher, totals, shared, with_gradient=needs_grad)
        output, scale = totals.output()
    return output._replace(loss=attach_gradients(output.loss, scale, (student,), (gradient,)))


def _form(
    student: Tensor, teacher: Tensor | None, totals: RowTotals, shared: int, *, with_gradient: bool
) -> Tensor | None:
    """The gradient [N, Vs] with respect to the student's logits, or None."""
    rows, like = totals.rows, totals.rows.weight
    count, width = student.shape
    plan = plan_chunks(count, widths=(width, shared), like=like, chunk_mb=totals.objective.chunk_mb)
    terms = TermRows(
        totals, shared=shared, block=plan.block, like=like, with_gradient=with_gradient
    )
    # The loss works in place: in the gradient where there is one, else in a chunk.
    work = like.new_empty(count if with_gradient else plan.chunk, width)
    for chunk in slices(count, plan.chunk):
        invalid = ~rows.valid[chunk, None]
        target = work[chunk] if with_gradient else work[: len(invalid)]
        target.copy_(student[chunk]).masked_fill_(invalid, 0)
        soft = None
        if teacher is not None:
            soft = teacher[chunk, :shared].to(like.dtype).masked_fill(invalid, 0)
        terms.run_(chunk, target, soft)
    return work if with_gradient else None
