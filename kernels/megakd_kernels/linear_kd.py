"""Distillation loss from hidden states and output matrices; [N, V] logits never exist.

This module checks and flattens; `ops` forms values and gradients chunk by chunk.
Shapes: N rows, V vocabulary, H width (Hs student, Ht teacher).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megakd_kernels import formed, ops, reference
from megakd_kernels.heads import Heads, checked_heads
from megakd_kernels.inputs import (
    Masks,
    Rows,
    check_constants,
    needs_gradient,
    without_autocast,
)
from megakd_kernels.linear_chunks import Side
from megakd_kernels.normalisation import Normalisation, operator_options
from megakd_kernels.row_plan import Warp
from megakd_kernels.row_terms import RowValues
from megakd_kernels.settings import (
    Divergence,
    Implementation,
    KDOutput,
    Number,
    Objective,
    resolve_implementation,
    warp,
)


def linear_kd_loss(  # noqa: PLR0913, the public contract: options are keyword-only
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
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
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap_s: float | None = None,
    softcap_t: float | None = None,
    logit_scale_s: float = 1.0,
    logit_scale_t: float = 1.0,
    chunk_mb: float | None = None,
    impl: str = "auto",
) -> KDOutput:
    """Return soft-target divergences and hard-label cross-entropy of two LM heads, in nats.

    forward_kl is KL(teacher || student) (Hinton et al. 2015, section 2), reverse_kl is
    KL(student || teacher) (Gu et al. 2024, MiniLLM), jsd is beta KL(teacher || m) +
    (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student (Agarwal et al. 2024,
    GKD, equation 1; beta 0 and 1 mean forward_kl and reverse_kl), skew_kl is KL(teacher ||
    skew teacher + (1 - skew) student) and skew_rkl KL(student || (1 - skew) teacher + skew
    student) (Ko et al. 2024, DistiLLM, equations 3 and 4; skew 0 means forward_kl and
    reverse_kl), tvd is half the sum of |teacher - student| (Wen et al. 2023, f-Distill).
    Both softmaxes run over the shared ids [0, vocab_size), at `temperature`; cross-entropy runs
    at temperature 1 over all ids of the student. Nothing is shifted: row n of the hidden states
    predicts labels[n].

    Gradients are formed in the forward, in fp32 and before every normalisation; the weights
    are not read in the backward. The teacher carries no gradient. Under autocast the products
    run in autocast's dtype, and everything else runs in fp32.

    Args:
        student_hidden: [N, Hs] or [B, T, Hs], any strides, fp32, bf16, fp16 or fp64.
        student_weight: [Vs, Hs].
        teacher_hidden: [N, Ht] or [B, T, Ht]; None: only cross-entropy.
        teacher_weight: [Vt, Ht].
        labels: [N] or [B, T] int64. None: every row counts, unless its token_weight is 0.
        divergence: a name, or a mapping of names to weights for a weighted sum.
        beta: parameter of jsd, in [0, 1].
        skew: parameter of skew_kl and skew_rkl, in [0, 1).
        temperature: above 0.
        t_squared: multiply divergences (value and gradient) by temperature^2.
        kd_weight: factor of the divergences; number or 0-d tensor.
        ce_weight: factor of cross-entropy; number or 0-d tensor. The number 0 skips it.
        token_weight: [N] or [B, T]; rows of weight 0 do not count and may hold anything.
        ignore_index: label of rows that do not count and may hold anything.
        vocab_size: number of ids that both softmaxes run over; None: min(Vs, Vt).
        num_items: divisor of reduction "num_items"; number or 0-d tensor.
        reduction: "sum"; "mean" over the valid rows; "num_items"; "none": [N] or [B, T],
            allowed only without gradient.
        student_bias: [Vs].
        teacher_bias: [Vt].
        softcap_s: c in c tanh(z / c), applied to the student's raw logits z; None: no cap.
        softcap_t: the same for the teacher.
        logit_scale_s: factor of the student's raw logits, before the cap.
        logit_scale_t: the same for the teacher.
        chunk_mb: budget of the chunk buffers in MiB; None: 1024 on a GPU, 64 on a CPU.
        impl: "triton", "chunked", "reference", or "auto", which MEGAKD_KERNELS overrides.

    Returns:
        KDOutput. Without a valid row the loss and all gradients are 0.

    Raises:
        ValueError: unknown name, option out of range, mismatched shapes, or reduction "none"
            while a gradient is needed.
    """
    objective = Objective(
        divergence=divergence, beta=beta, skew=skew, temperature=temperature,
        t_squared=t_squared, kd_weight=kd_weight, ce_weight=ce_weight, reduction=reduction,
        num_items=num_items, chunk_mb=chunk_mb,
    )  # fmt: skip
    warps = (warp("s", logit_scale_s, softcap_s), warp("t", logit_scale_t, softcap_t))
    heads = checked_heads(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias), vocab_size,
    )  # fmt: skip
    objective.check_inputs(
        has_teacher=heads.teacher is not None,
        has_labels=labels is not None,
        needs_grad=any(needs_gradient(tensor) for tensor in heads.student),
    )
    check_constants(token_weight=token_weight)
    masks = Masks(labels, token_weight, ignore_index).checked(student_hidden.shape[:-1])
    rows = heads.rows(masks, with_ids=objective.wants_ce)
    implementation = resolve_implementation(impl, student_hidden.device)
    output = solve(heads, rows, objective, warps, implementation)
    if reduction == "none":
        return output._replace(loss=output.loss.reshape(student_hidden.shape[:-1]))
    return output


def solve(
    heads: Heads,
    rows: Rows,
    objective: Objective,
    warps: tuple[Warp, Warp],
    implementation: Implementation,
) -> KDOutput:
    """Return the loss of checked heads and rows, on one code path."""
    with without_autocast(heads.student.hidden.device):
        if implementation == "reference":
            return _reference(heads, rows, objective, warps)
        options = operator_options(objective, heads.shared, warps, implementation)
        return _formed(heads, rows, objective, options)


def _reference(
    heads: Heads, rows: Rows, objective: Objective, warps: tuple[Warp, Warp]
) -> KDOutput:
    logits = _full_logits(heads.student, rows)
    with torch.no_grad():
        soft = None if heads.teacher is None else _full_logits(heads.teacher, rows)
    return reference.kd_loss(logits, soft, rows, objective, heads.shared, warps)


def _full_logits(side: Side, rows: Rows) -> Tensor:
    # Rows that do not count must not reach the weight's gradient: 0 times NaN is NaN there.
    hidden = torch.where(rows.valid[:, None], side.hidden, 0)
    return reference.project(hidden, side.weight, side.bias, rows.weight.dtype)


def _formed(
    heads: Heads, rows: Rows, objective: Objective, options: tuple[object, ...]
) -> KDOutput:
    student, teacher = heads.student, heads.teacher
    normalised = Normalisation.of(rows, objective, with_teacher=teacher is not None)
    values = formed.run(
        ops.linear_kd, *student, *(teacher or (None, None, None)), rows.valid, rows.labels,
        normalised.kd_factor, normalised.ce_factor, [needs_gradient(each) for each in student],
        *options,
    )  # fmt: skip
    return normalised.output(RowValues(*values[:4]))
