"""Distillation loss from existing logits: classes, or a small vocabulary.

Shapes: N rows (examples or positions), V classes or vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from megakd_kernels import formed, ops, reference
from megakd_kernels.inputs import (
    Masks,
    Rows,
    check_constants,
    compute_dtype,
    needs_gradient,
    select_rows,
    shared_vocabulary,
    without_autocast,
)
from megakd_kernels.normalisation import Normalisation, operator_options
from megakd_kernels.row_plan import Warp
from megakd_kernels.row_terms import RowValues
from megakd_kernels.settings import (
    Divergence,
    KDOutput,
    Number,
    Objective,
    is_small,
    resolve_implementation,
)


def kd_loss_from_logits(  # noqa: PLR0913, the public contract: options are keyword-only
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
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
    chunk_mb: float | None = None,
    impl: str = "auto",
) -> KDOutput:
    """Return divergences and cross-entropy of logits, in nats; options as in `linear_kd_loss`.

    With `valid`, the divergences run over all valid rows, and cross-entropy runs over the valid
    rows that have a label. Without `valid`, rows without a label do not count.

    Args:
        student_logits: [..., Vs], such as [B, C] of a classifier.
        teacher_logits: [..., Vt], or None for only cross-entropy; carries no gradient.
        labels: [...] int64, ignore_index for rows without a label.
        divergence: forward_kl, reverse_kl, jsd, skew_kl, skew_rkl, tvd, or a mapping of these
            to weights.
        beta: parameter of jsd, in [0, 1].
        skew: parameter of skew_kl and skew_rkl, in [0, 1).
        temperature: above 0; cross-entropy runs at 1.
        t_squared: multiply divergences (value and gradient) by temperature^2.
        kd_weight: factor of the divergences; number or 0-d tensor.
        ce_weight: factor of cross-entropy; number or 0-d tensor. The number 0 skips it.
        token_weight: [...]; rows of weight 0 do not count and may hold anything.
        ignore_index: label of unlabelled rows.
        vocab_size: number of ids that both softmaxes run over; None: min(Vs, Vt).
        num_items: divisor of reduction "num_items"; number or 0-d tensor.
        reduction: "sum"; "mean" over the valid rows; "num_items"; "none": [...],
            allowed only without gradient.
        valid: [...] bool; rows that are False may hold anything.
        chunk_mb: budget of the chunk buffers in MiB; None: 1024 on a GPU, 64 on a CPU.
        impl: "triton", "chunked", "reference", or "auto", which MEGAKD_KERNELS overrides.

    Returns:
        KDOutput; n_valid counts the rows of the divergences.

    Raises:
        ValueError: unknown name, option out of range, mismatched shapes, or reduction "none"
            while a gradient is needed.
    """
    objective = Objective(
        divergence=divergence, beta=beta, skew=skew, temperature=temperature,
        t_squared=t_squared, kd_weight=kd_weight, ce_weight=ce_weight, reduction=reduction,
        num_items=num_items, chunk_mb=chunk_mb,
    )  # fmt: skip
    check_constants(teacher_logits=teacher_logits, token_weight=token_weight)
    student, teacher, shared = _flatten(student_logits, teacher_logits, vocab_size)
    objective.check_inputs(
        has_teacher=teacher is not None,
        has_labels=labels is not None,
        needs_grad=needs_gradient(student),
    )
    masks = Masks(labels, token_weight, ignore_index, valid).checked(student_logits.shape[:-1])
    rows = select_rows(
        len(student), like=student.new_empty((), dtype=compute_dtype(student, teacher)),
        masks=masks, ids=student.shape[1] if objective.wants_ce else None,
    )  # fmt: skip
    implementation = resolve_implementation(impl, student.device)
    with without_autocast(student.device):
        if implementation == "reference":
            output = reference.kd_loss(student, teacher, rows, objective, shared)
        elif is_small(impl, student, teacher):
            # In fp64, so that the result is as exact as that of the operator.
            soft = None if teacher is None else teacher.double()
            output = reference.kd_loss(student.double(), soft, rows, objective, shared)
        else:
            options = operator_options(objective, shared, (Warp(), Warp()), implementation)
            output = _formed(student, teacher, rows, objective, options)
    if reduction == "none":
        return output._replace(loss=output.loss.reshape(student_logits.shape[:-1]))
    return output


def _flatten(
    student: Tensor, teacher: Tensor | None, vocab_size: int | None
) -> tuple[Tensor, Tensor | None, int]:
    ids = student.shape[-1]
    if teacher is None:
        return student.reshape(-1, ids), None, ids
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"student_logits are {list(student.shape)} and teacher_logits {list(teacher.shape)}; "
            "only the last dimension may differ"
        )
    shared = shared_vocabulary(ids, teacher.shape[-1], vocab_size)
    return student.reshape(-1, ids), teacher.reshape(-1, teacher.shape[-1]), shared


def _formed(
    student: Tensor,
    teacher: Tensor | None,
    rows: Rows,
    objective: Objective,
    options: tuple[object, ...],
) -> KDOutput:
    normalised = Normalisation.of(rows, objective, with_teacher=teacher is not None)
    factors = (normalised.kd_factor, normalised.ce_factor)
    values = formed.run(
        ops.logits_kd, student, teacher, rows.valid, rows.labels, *factors,
        needs_gradient(student), *options,
    )  # fmt: skip
    return normalised.output(RowValues(*values[:4]))
