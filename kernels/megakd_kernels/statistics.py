"""Distance of a student from its teacher and its labels, without gradients and [N, V] logits.

For evaluation: the chunks of `linear_kd_loss` without a gradient, and the teacher's entropy.
Shapes: N rows, V vocabulary, H width (Hs student, Ht teacher).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels import linear_kd
from megakd_kernels.heads import checked_heads
from megakd_kernels.inputs import Masks
from megakd_kernels.settings import Objective, resolve_implementation, warp


class LinearStats(NamedTuple):
    """Sums over the valid rows; every sum is 0-d and carries no gradient.

    kl_sum: token_weight * KL(teacher || student) at the temperature, nats; 0 without a teacher.
    ce_sum: token_weight * hard-label cross-entropy at temperature 1, nats; 0 without labels.
    teacher_entropy_sum: token_weight * entropy of the teacher at the temperature, nats. Its
        sum with kl_sum is the cross-entropy against the teacher; the entropy is the lower bound.
    agreement: number of rows whose most likely shared id is the same for both models; without a
        teacher, number of rows whose label is the most likely id; not weighted. Of several equal
        maxima a model chooses one at random: a row counts with the probability of a match.
    n_valid: number of rows that count, int64.
    """

    kl_sum: Tensor
    ce_sum: Tensor
    teacher_entropy_sum: Tensor
    agreement: Tensor
    n_valid: Tensor


@torch.no_grad()
def linear_stats(  # noqa: PLR0913, the public contract: options are keyword-only
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap_s: float | None = None,
    softcap_t: float | None = None,
    logit_scale_s: float = 1.0,
    logit_scale_t: float = 1.0,
    chunk_mb: float | None = None,
    impl: str = "auto",
) -> LinearStats:
    """Return divergence, cross-entropy, teacher entropy and agreement of two LM heads.

    One sweep computes all statistics. The softmaxes of the divergence run over the shared ids
    [0, vocab_size) at `temperature`, without a factor of temperature^2; cross-entropy runs at
    temperature 1 over every id of the student. Nothing is shifted: row n of the hidden states
    predicts labels[n].

    Args:
        student_hidden: [N, Hs] or [B, T, Hs], any strides, fp32, bf16, fp16 or fp64.
        student_weight: [Vs, Hs].
        teacher_hidden: [N, Ht] or [B, T, Ht]; None: only cross-entropy and accuracy.
        teacher_weight: [Vt, Ht].
        labels: [N] or [B, T] integer ids. None: every row counts, unless its token_weight is 0.
        temperature: temperature of the divergence and the entropy, above 0.
        token_weight: [N] or [B, T]; rows of weight 0 do not count and may hold anything.
        ignore_index: label of rows that do not count and may hold anything.
        vocab_size: number of ids that both softmaxes run over; None: min(Vs, Vt).
        student_bias: [Vs].
        teacher_bias: [Vt].
        softcap_s: logits z of the student become softcap_s * tanh(z / softcap_s).
        softcap_t: the same for the teacher.
        logit_scale_s: factor of the student's logits, before the cap.
        logit_scale_t: the same for the teacher.
        chunk_mb: budget of the chunk buffers in MiB; None: as in `linear_kd_loss`.
        impl: "triton", "chunked", "reference", or "auto", which MEGAKD_KERNELS overrides.

    Returns:
        LinearStats, sums in nats. Without a valid row all sums are 0.

    Raises:
        ValueError: neither teacher nor labels, mismatched shapes, or an option out of range.
    """
    objective = Objective(
        divergence="forward_kl", beta=0.5, skew=0.1, temperature=temperature, t_squared=False,
        kd_weight=1.0, ce_weight=float(labels is not None), reduction="sum", num_items=None,
        chunk_mb=chunk_mb, with_entropy=True,
    )  # fmt: skip
    warps = (warp("s", logit_scale_s, softcap_s), warp("t", logit_scale_t, softcap_t))
    heads = checked_heads(
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias), vocab_size,
    )  # fmt: skip
    if heads.teacher is None and labels is None:
        raise ValueError("the student has no target: pass a teacher or labels")
    masks = Masks(labels, token_weight, ignore_index).checked(student_hidden.shape[:-1])
    implementation = resolve_implementation(impl, student_hidden.device)
    out = linear_kd.solve(heads, heads.rows(masks, with_ids=True), objective, warps, implementation)
    kl, entropy = out.ce_sum.new_zeros(2) if heads.teacher is None else out.divergence_sums
    return LinearStats(kl, out.ce_sum, entropy, out.agreement, out.n_valid)
