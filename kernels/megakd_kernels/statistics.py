"""Distance of a student from its teacher and its labels, without gradients and [N, V] logits.

For evaluation: the chunks of `linear_kd_loss` without a gradient, and the teacher's entropy.
Shapes: N rows, V vocabulary, H width (Hs student, Ht teacher).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd_kernels import formed, ops, reference
from megakd_kernels.heads import check_same_rows, checked_side, checked_teacher, heads_dtype
from megakd_kernels.inputs import Masks, Rows, select_rows, without_autocast
from megakd_kernels.linear_chunks import Side
from megakd_kernels.row_plan import Warp
from megakd_kernels.settings import resolve_implementation, warp, weigh
from megakd_kernels.vocab_parallel import shard_of

_ROUND_LOGITS = False


class LinearStats(NamedTuple):
    """Sums over the valid rows; every sum is 0-d and carries no gradient.

    kl_sum: token_weight * KL(teacher || student) at the temperature, nats; 0 without a teacher.
    ce_sum: token_weight * hard-label cross-entropy at temperature 1, nats; 0 without labels.
    teacher_entropy_sum: token_weight * entropy of the teacher at the temperature, nats. Its
        sum with kl_sum is the cross-entropy against the teacher; the entropy is the lower bound.
    agreement: number of rows whose most likely shared id is the same for both models (of several
        equal maxima, one in common is enough); without a teacher, number of rows whose label is
        a most likely id. int64, not weighted.
    n_valid: number of rows that count, int64.
    """

    kl_sum: Tensor
    ce_sum: Tensor
    teacher_entropy_sum: Tensor
    agreement: Tensor
    n_valid: Tensor


class _Task(NamedTuple):
    """Rows, ids and logit transforms to evaluate; both softmaxes run over the ids [0, shared)."""

    rows: Rows
    shared: int
    temperature: float
    warps: tuple[Warp, Warp]
    implementation: str
    chunk_mb: float


class _Values(NamedTuple):
    """Statistics per row, each [N]: nats, nats, nats, bool."""

    kl: Tensor
    entropy: Tensor
    ce: Tensor
    agrees: Tensor


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
    _check_options(temperature, chunk_mb)
    student = checked_side("student", student_hidden, student_weight, student_bias)
    teacher = checked_teacher(teacher_hidden, teacher_weight, teacher_bias)
    if teacher is None and labels is None:
        raise ValueError("the student has no target: pass a teacher or labels")
    check_same_rows(student_hidden, teacher_hidden)
    ids = shard_of(None, 0, len(student.weight), vocab_size)
    rows = select_rows(
        len(student.hidden),
        like=student.hidden.new_empty((), dtype=heads_dtype(student, teacher)),
        masks=Masks(labels, token_weight, ignore_index).checked(student_hidden.shape[:-1]),
        ids=ids,
    )
    task = _Task(
        rows=rows,
        shared=ids.shared(None if teacher is None else len(teacher.weight)),
        temperature=float(temperature),
        warps=(warp("s", logit_scale_s, softcap_s), warp("t", logit_scale_t, softcap_t)),
        implementation=resolve_implementation(impl, student.hidden.device),
        chunk_mb=chunk_mb or 0.0,
    )
    run = _reference if task.implementation == "reference" else _in_chunks
    with without_autocast(student.hidden.device):
        kl, entropy, ce, agrees = run(student, teacher, task)
    return LinearStats(
        weigh(kl, rows.weight).sum(),
        weigh(ce, rows.hard_weight).sum(),
        weigh(entropy, rows.weight).sum(),
        (agrees & rows.valid).sum(),
        rows.valid.sum(),
    )


def _in_chunks(student: Side, teacher: Side | None, task: _Task) -> _Values:
    rows, nothing = task.rows, torch.zeros_like(task.rows.weight)
    soft = (None, None, None) if teacher is None else teacher
    unused = (0.5, 0.1)  # of divergences that mix both models
    numbers = [*unused, task.temperature, 1.0, *task.warps[0], *task.warps[1]]
    _, values, ce, agrees, *_ = formed.run(
        ops.linear_kd, *student, *soft, rows.valid, rows.labels, nothing, nothing, [False] * 3,
        "forward_kl,teacher_entropy", [1.0, 0.0], numbers, task.shared, rows.labels is not None,
        0, "", task.implementation, _ROUND_LOGITS, task.chunk_mb,
    )  # fmt: skip
    kl, entropy = (nothing, nothing) if teacher is None else values
    return _Values(kl, entropy, ce, agrees)


def _reference(student: Side, teacher: Side | None, task: _Task) -> _Values:
    rows, dtype = task.rows, heads_dtype(student, teacher)
    logits = _full_logits(student, rows.valid, task.warps[0], dtype)
    ce = zeros = logits.new_zeros(len(logits))
    if rows.labels is not None:
        ce = F.cross_entropy(logits, rows.labels, reduction="none")
    if teacher is None:
        return _Values(zeros, zeros, ce, reference.is_right(logits, rows.labels))
    logits = logits[:, : task.shared]
    soft = _full_logits(teacher, rows.valid, task.warps[1], dtype)[:, : task.shared]
    log_q = F.log_softmax(logits / task.temperature, -1)
    log_p = F.log_softmax(soft / task.temperature, -1)
    p = log_p.exp()
    kl = reference.forward_kl(log_p, log_q)
    entropy = -torch.where(p == 0, 0, p * log_p).sum(-1)
    return _Values(kl, entropy, ce, reference.share_a_maximum(logits, soft))


def _full_logits(side: Side, valid: Tensor, bend: Warp, dtype: torch.dtype) -> Tensor:
    hidden = torch.where(valid[:, None], side.hidden, 0)
    return reference.warped(reference.project(hidden, side.weight, side.bias, dtype), bend)


def _check_options(temperature: float, chunk_mb: float | None) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if chunk_mb is not None and not chunk_mb > 0:
        raise ValueError(f"chunk_mb must be above 0, got {chunk_mb}")
