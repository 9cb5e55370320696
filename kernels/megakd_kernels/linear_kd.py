"""Distillation loss from hidden states and output matrices; [N, V] logits never exist.

Per chunk of rows: student and teacher logits, losses and the gradient with respect to the
student's logits (written over them), then its products with the weight and the hidden states.
Shapes: N rows, C rows of a chunk, V vocabulary, H width (Hs student, Ht teacher).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class _Side(NamedTuple):
    """One model: hidden [N, H], weight [V, H], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def linear_kd_loss(  # noqa: PLR0913, the public contract: options are keyword-only
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
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
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logits_dtype: str = "fp32",
    chunk_mb: float = 1024,
    impl: str = "auto",
) -> KDOutput:
    """Soft-target divergences and hard-label cross-entropy of two LM heads, in nats.

    forward_kl is KL(teacher || student) (Hinton et al. 2015, section 2), reverse_kl is
    KL(student || teacher) (Gu et al. 2024, MiniLLM), jsd is beta KL(teacher || m) +
    (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student (Agarwal et al. 2024,
    GKD, equation 1; beta 0 and 1 mean forward_kl and reverse_kl). Both softmaxes run over the
    shared ids [0, vocab_size), at `temperature`; cross-entropy runs at temperature 1 over all
    ids of the student. Nothing is shifted: row n of the hidden states predicts labels[n].

    Gradients are formed in the forward, in fp32 and before every normalisation; the weights
    are not read in the backward. The teacher carries no gradient.

    Args:
        student_hidden: [N, Hs] or [B, T, Hs], any strides, fp32, bf16, fp16 or fp64.
        student_weight: [Vs, Hs].
        teacher_hidden: [N, Ht] or [B, T, Ht]; None leaves cross-entropy alone.
        teacher_weight: [Vt, Ht].
        labels: [N] or [B, T] int64. None: every row counts, unless its token_weight is 0.
        divergence: a name, or a mapping of names to weights for a weighted sum.
        beta: of jsd, in [0, 1].
        temperature: above 0.
        t_squared: multiply divergences (value and gradient) by temperature^2.
        kd_weight: factor of the divergences; number or 0-d tensor.
        ce_weight: factor of cross-entropy; number or 0-d tensor. The number 0 skips it.
        token_weight: [N] or [B, T]; rows of weight 0 do not count and may hold anything.
        ignore_index: label of rows that do not count and may hold anything.
        vocab_size: ids both softmaxes run over; None is min(Vs, Vt).
        num_items: divisor of reduction "num_items"; number or 0-d tensor.
        reduction: "sum"; "mean" over the valid rows; "num_items"; "none": [N] or [B, T],
            only without gradient.
        student_bias: [Vs].
        teacher_bias: [Vt].
        logits_dtype: "fp32", or "bf16" to round the logits as a bf16 model does.
        chunk_mb: budget of the chunk buffers in MiB (less is used on a CPU).
        impl: "chunked", "reference", or "auto", which MEGAKD_KERNELS overrides.

    Returns:
        KDOutput. Without a valid row the loss is 0 and so is every gradient.

    Raises:
        ValueError: unknown name, option out of range, shapes that do not fit, or reduction
            "none" while a gradient is needed.
    """
    objective = Objective(
        divergence=divergence, beta=beta, temperature=temperature, t_squared=t_squared,
        kd_weight=kd_weight, ce_weight=ce_weight, reduction=reduction, num_items=num_items,
        logits_dtype=logits_dtype, chunk_mb=chunk_mb,
    )  # fmt: skip
    student = _side("student", student_hidden, student_weight, student_bias)
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = _side("teacher", teacher_hidden, teacher_weight, teacher_bias)
    elif teacher_hidden is not None or teacher_weight is not None:
        raise ValueError("teacher_hidden and teacher_weight must be given together")
    _check_fit(student, teacher, objective, labels)
    like = torch.empty((), dtype=_dtype(student, teacher), device=student.hidden.device)
    rows = select_rows(
        len(student.hidden),
        like=like,
        labels=labels,
        token_weight=token_weight,
        ignore_index=ignore_index,
    )
    shared = len(student.weight)
    if teacher is not None:
        shared = shared_vocabulary(shared, len(teacher.weight), vocab_size)
    paths = {"reference": _reference, "chunked": _chunked}
    output = paths[resolve_implementation(impl)](student, teacher, rows, objective, shared)
    if reduction == "none":
        return output._replace(loss=output.loss.reshape(student_hidden.shape[:-1]))
    return output


def _reference(
    student: _Side, teacher: _Side | None, rows: Rows, objective: Objective, shared: int
) -> KDOutput:
    dtype = _dtype(student, teacher)
    # Rows that do not count must not reach the weight's gradient: 0 times NaN is NaN there.
    valid = rows.valid[:, None]
    with torch.autocast(student.hidden.device.type, enabled=False):
        logits = _full_logits(student, valid, dtype, objective)
        with torch.no_grad():
            soft = None if teacher is None else _full_logits(teacher, valid, dtype, objective)
        return reference.kd_loss(logits, soft, rows, objective, shared)


def _full_logits(side: _Side, valid: Tensor, dtype: torch.dtype, objective: Objective) -> Tensor:
    hidden = torch.where(valid, side.hidden, 0)
    logits = reference.project(hidden, side.weight, side.bias, dtype)
    if objective.logits_dtype == "bf16":
        return logits.to(torch.bfloat16).to(dtype)
    return logits


@dataclass(kw_only=True)
class _Gradients:
    """Formed gradients in the compute dtype; None for an input that needs none."""

    hidden: Tensor | None  # [N, Hs]
    weight: Tensor | None  # [Vs, Hs]
    bias: Tensor | None  # [Vs]
    used_ids: int
    has_rows: bool = False

    @property
    def is_needed(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(self, chunk: slice, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Takes the gradient [C, used_ids] with respect to one chunk's logits."""
        narrow = narrow_gradient(gradient, hidden)
        if self.hidden is not None:
            input_gradient_into(self.hidden[chunk], narrow, weight)
        if self.weight is not None:
            beta = 1.0 if self.has_rows else 0.0
            add_weight_gradient_(self.weight[: self.used_ids], narrow, hidden, beta=beta)
        if self.bias is not None:
            self.bias[: self.used_ids] += gradient.sum(0)
        self.has_rows = True


def _chunked(
    student: _Side, teacher: _Side | None, rows: Rows, objective: Objective, shared: int
) -> KDOutput:
    device = student.hidden.device.type
    needed = tuple(_needs_gradient(tensor) for tensor in student)
    with torch.no_grad(), torch.autocast(device, enabled=False):
        # Ids that only the student has matter to cross-entropy alone.
        used_ids = len(student.weight) if objective.wants_ce else shared
        gradients = _empty_gradients(student, needed, used_ids, _dtype(student, teacher))
        totals = _form(student, teacher, rows, objective, shared, gradients)
        output, scale = totals.output()
    pairs = [
        (student.hidden, gradients.hidden),
        (student.weight, gradients.weight),
        (student.bias, gradients.bias),
    ]
    present = [(tensor, gradient) for tensor, gradient in pairs if tensor is not None]
    loss = attach_gradients(
        output.loss, scale, tuple(tensor for tensor, _ in present), tuple(g for _, g in present)
    )
    return output._replace(loss=loss)


def _empty_gradients(
    student: _Side, needed: tuple[bool, ...], used_ids: int, dtype: torch.dtype
) -> _Gradients:
    hidden, weight, bias = needed
    weight_gradient = None
    if weight:
        weight_gradient = torch.empty_like(
            student.weight, dtype=dtype, memory_format=torch.contiguous_format
        )
        # The first chunk writes the rows in use; the others stay at 0.
        weight_gradient[used_ids if len(student.hidden) else 0 :] = 0
    return _Gradients(
        hidden=student.hidden.new_empty(student.hidden.shape, dtype=dtype) if hidden else None,
        weight=weight_gradient,
        bias=student.weight.new_zeros(len(student.weight), dtype=dtype) if bias else None,
        used_ids=used_ids,
    )


def _form(
    student: _Side,
    teacher: _Side | None,
    rows: Rows,
    objective: Objective,
    shared: int,
    gradients: _Gradients,
) -> RowTotals:
    """Runs all chunks; fills `gradients`."""
    dtype = _dtype(student, teacher)
    weight = student.weight[: gradients.used_ids].detach()
    bias = None if student.bias is None else student.bias[: gradients.used_ids].detach()
    totals = RowTotals(rows, objective, with_teacher=teacher is not None)
    widths = (len(weight),) if teacher is None else (len(weight), shared)
    count = len(student.hidden)
    plan = plan_chunks(count, widths=widths, like=rows.weight, chunk_mb=objective.chunk_mb)
    buffers = [rows.weight.new_empty(plan.chunk, width) for width in widths]
    terms = TermRows(
        totals, shared=shared, block=plan.block, like=buffers[0], with_gradient=gradients.is_needed
    )
    for chunk in slices(count, plan.chunk):
        valid = rows.valid[chunk]
        logits = [buffer[: len(valid)] for buffer in buffers]
        hidden = masked_rows(student.hidden[chunk], valid, dtype)
        _project(logits[0], hidden, weight, bias, objective)
        if teacher is not None:
            _project_teacher(logits[1], teacher, chunk, valid, objective)
        terms.run_(chunk, *logits)
        if gradients.is_needed:
            gradients.add(chunk, logits[0], hidden, weight)
    return totals


def _project(
    out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, objective: Objective
) -> None:
    project_into(out, hidden, weight, bias)
    if objective.logits_dtype == "bf16":
        out.copy_(out.to(torch.bfloat16))


def _project_teacher(
    out: Tensor, teacher: _Side, chunk: slice, valid: Tensor, objective: Objective
) -> None:
    shared = out.shape[1]
    bias = None if teacher.bias is None else teacher.bias[:shared]
    hidden = masked_rows(teacher.hidden[chunk], valid, out.dtype)
    _project(out, hidden, teacher.weight[:shared], bias, objective)


def _side(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Side:
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}_hidden is {list(hidden.shape)} and {name}_weight {list(weight.shape)}; "
            "they must be [..., H] and [V, H]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}_bias is {list(bias.shape)} for {len(weight)} ids")
    return _Side(hidden.reshape(-1, hidden.shape[-1]), weight, bias)


def _check_fit(
    student: _Side, teacher: _Side | None, objective: Objective, labels: Tensor | None
) -> None:
    if teacher is not None and len(teacher.hidden) != len(student.hidden):
        raise ValueError(
            f"the student has {len(student.hidden)} rows and the teacher {len(teacher.hidden)}"
        )
    objective.check_inputs(
        has_teacher=teacher is not None,
        has_labels=labels is not None,
        needs_grad=any(_needs_gradient(tensor) for tensor in student),
    )


def _needs_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _dtype(student: _Side, teacher: _Side | None) -> torch.dtype:
    return compute_dtype(*student, *(teacher or ()))
