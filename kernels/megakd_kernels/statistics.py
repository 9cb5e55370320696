"""Distance of a student from its teacher and its labels, without gradients and [N, V] logits.

For evaluation: one sweep over the two heads computes all statistics. On a GPU no logit is stored
(`triton.linear_stats`); on other devices small chunks of logits are stored.
Shapes: N rows, V vocabulary, H width (Hs student, Ht teacher).
"""

# No `from __future__ import annotations`: torch reads the operator's annotations.

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd_kernels import reference
from megakd_kernels.chunking import (
    chunk_budget_on,
    logits_buffer,
    masked_rows,
    plan_chunks,
    project_into,
    slices,
)
from megakd_kernels.heads import check_same_rows, checked_side, checked_teacher, heads_dtype
from megakd_kernels.inputs import (
    Masks,
    compute_dtype,
    rows_to_keep,
    select_rows,
    without_autocast,
)
from megakd_kernels.linear_chunks import Side
from megakd_kernels.row_losses import LOG2, RowLosses
from megakd_kernels.row_plan import RowInputs, RowPlan, Scratch, Warp
from megakd_kernels.row_terms import row_blocks, spread
from megakd_kernels.settings import resolve_implementation, warp, weigh
from megakd_kernels.vocab_parallel import shard_of


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


class StatsTask(NamedTuple):
    """Rows, ids and logit transforms to evaluate; common to all code paths.

    valid: [N] bool; other rows may hold anything.
    labels: [N] int64 ids of the student, or None.
    shared: both softmaxes of the divergence run over the ids [0, shared).
    """

    valid: Tensor
    labels: Tensor | None
    shared: int
    temperature: float
    student_warp: Warp
    teacher_warp: Warp
    chunk_mb: float


class RowStats(NamedTuple):
    """Statistics per row, each [N]: nats, nats, nats, and 1 if the row agrees, else 0."""

    kl: Tensor
    ce: Tensor
    entropy: Tensor
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
        chunk_mb: budget of the chunk buffers in MiB; None: as in `linear_kd_loss`. "triton" needs
            none.
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
    check_same_rows(student, teacher)
    ids = shard_of(None, 0, len(student.weight), vocab_size)
    rows = select_rows(
        len(student.hidden),
        like=student.hidden.new_empty((), dtype=heads_dtype(student, teacher)),
        masks=Masks(labels, token_weight, ignore_index),
        ids=ids,
    )
    stats = _linear_stats_op(
        *student,
        *(teacher or (None, None, None)),
        rows.valid,
        rows.labels,
        ids.shared(None if teacher is None else len(teacher.weight)),
        float(temperature),
        [*warp("s", logit_scale_s, softcap_s), *warp("t", logit_scale_t, softcap_t)],
        chunk_mb or 0.0,
        resolve_implementation(impl, student.hidden.device),
    )
    kl, ce, entropy, agrees = stats.unbind(0)
    return LinearStats(
        weigh(kl, rows.weight).sum(),
        weigh(ce, rows.hard_weight).sum(),
        weigh(entropy, rows.weight).sum(),
        agrees.long().sum(),
        rows.valid.sum(),
    )


@torch.library.custom_op("megakd::linear_stats", mutates_args=())
def _linear_stats_op(  # noqa: PLR0913, PLR0917, an operator takes flat arguments
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    valid: Tensor,
    labels: Tensor | None,
    shared: int,
    temperature: float,
    warps: Sequence[float],
    chunk_mb: float,
    implementation: str,
) -> Tensor:
    """Return [4, N], the fields of `RowStats`, with 0 in rows that are not valid."""
    student = Side(student_hidden, student_weight, student_bias)
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Side(teacher_hidden, teacher_weight, teacher_bias).ids(shared)
    student_warp, teacher_warp = Warp(*warps[:2]), Warp(*warps[2:])
    task = StatsTask(valid, labels, shared, temperature, student_warp, teacher_warp, chunk_mb)
    with without_autocast(student_hidden.device):
        if implementation == "triton" and heads_dtype(student, teacher) == torch.float32:
            # Imported here because the package also works without Triton. The kernel accumulates
            # in fp32; torch computes fp64, which only gradient checks use.
            from megakd_kernels.triton.linear_stats import tiled_stats

            stats = tiled_stats(student, teacher, task)
            return torch.where(valid, torch.stack(stats), 0)
        return _with_torch(student, teacher, task, _PATHS.get(implementation, _chunked))


@_linear_stats_op.register_fake
def _(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None,
    teacher_hidden: Tensor | None, teacher_weight: Tensor | None, teacher_bias: Tensor | None,
    *options: object,
) -> Tensor:  # fmt: skip
    del options
    student = (student_hidden, student_weight, student_bias)
    dtype = compute_dtype(*student, teacher_hidden, teacher_weight, teacher_bias)
    return student_hidden.new_empty((4, len(student_hidden)), dtype=dtype)


def _with_torch(
    student: Side, teacher: Side | None, task: StatsTask, path: Callable[..., RowStats]
) -> Tensor:
    """Run `path` in torch; skip rows that do not count if reading the mask is free."""
    valid = task.valid
    kept = rows_to_keep(valid)
    if kept is None:
        return torch.where(valid, torch.stack(path(student, teacher, task)), 0)
    labels = None if task.labels is None else task.labels[kept]
    task = task._replace(valid=valid[kept], labels=labels)
    stats = path(student.rows(kept), None if teacher is None else teacher.rows(kept), task)
    return spread(torch.stack(stats), kept, len(valid))


def _reference(student: Side, teacher: Side | None, task: StatsTask) -> RowStats:
    dtype = heads_dtype(student, teacher)
    logits = _full_logits(student, task.valid, task.student_warp, dtype)
    ce = zeros = logits.new_zeros(len(logits))
    if task.labels is not None:
        ce = F.cross_entropy(logits, task.labels, reduction="none")
    if teacher is None:
        return RowStats(zeros, ce, zeros, _label_is_top(logits, task.labels).to(dtype))
    logits = logits[:, : task.shared]
    soft = _full_logits(teacher, task.valid, task.teacher_warp, dtype)
    log_q = F.log_softmax(logits / task.temperature, -1)
    log_p = F.log_softmax(soft / task.temperature, -1)
    p = log_p.exp()
    kl = reference.forward_kl(log_p, log_q)
    entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)
    return RowStats(kl, ce, entropy, reference.share_a_maximum(logits, soft).to(dtype))


def _full_logits(side: Side, valid: Tensor, bend: Warp, dtype: torch.dtype) -> Tensor:
    hidden = torch.where(valid[:, None], side.hidden, 0)
    return reference.warped(reference.project(hidden, side.weight, side.bias, dtype), bend)


def _label_is_top(logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("rows without a teacher need labels")
    return logits.gather(1, labels[:, None]).squeeze(1) == logits.amax(-1)


def _chunked(student: Side, teacher: Side | None, task: StatsTask) -> RowStats:
    """Compute the statistics chunk by chunk, with the row kernels of the losses (`row_losses`)."""
    # Ids that only the student has matter only to cross-entropy.
    used = student if task.labels is not None else student.ids(task.shared)
    sides = [(used, task.student_warp)]
    if teacher is not None:
        sides.append((teacher, task.teacher_warp))
    count = len(used.hidden)
    like = used.hidden.new_empty((), dtype=heads_dtype(student, teacher))
    widths = tuple(len(side.weight) for side, _ in sides)
    sizes = plan_chunks(
        count,
        widths=widths,
        like=like,
        chunk_mb=chunk_budget_on(like.device, task.chunk_mb),
    )
    buffers = [logits_buffer(sizes.chunk, width, like) for width in widths]
    losses = RowLosses(plan=_row_plan(task, len(sides)), scratch=Scratch(sizes.block, like))
    stats = RowStats(*like.new_zeros(4, count).unbind(0))
    for chunk in slices(count, sizes.chunk):
        for buffer, (side, bend) in zip(buffers, sides, strict=True):
            hidden = masked_rows(side.hidden[chunk], task.valid[chunk], like.dtype)
            out = buffer[: len(hidden)]
            _warp_(project_into(out, hidden, side.weight, side.bias), bend)
        for part, rows in row_blocks(chunk, sizes.block):
            _score_(stats, rows, [buffer[part] for buffer in buffers],
                    task, losses)  # fmt: skip
    return stats


def _score_(
    stats: RowStats, rows: slice, logits: list[Tensor], task: StatsTask, losses: RowLosses
) -> None:
    """Write the statistics of one block of rows; the logits are overwritten."""
    student, teacher = logits[0], logits[1] if len(logits) > 1 else None
    if teacher is not None:
        stats.entropy[rows] = _entropy(teacher, task.temperature, losses.scratch)
    factor = torch.zeros_like(stats.ce[rows])
    labels = None if task.labels is None else task.labels[rows]
    inputs = RowInputs(task.valid[rows], labels, factor, factor)
    terms = losses.run_(student, teacher, inputs, None)
    if teacher is not None:
        stats.kl[rows] = terms.divergences[0]
    stats.ce[rows] = terms.ce
    stats.agrees[rows] = terms.agrees.to(factor.dtype)


def _entropy(logits: Tensor, temperature: float, scratch: Scratch) -> Tensor:
    """Return the entropy per row in nats, [R, V] -> [R]; an id of probability 0 adds 0."""
    bits = scratch.take("bits", logits.shape)
    torch.sub(logits, logits.amax(-1, keepdim=True), out=bits).mul_(1 / (LOG2 * temperature))
    mass = torch.exp2(bits, out=scratch.take("mass", logits.shape))
    total = mass.sum(-1)
    # The mass at the limit is 0; without the limit, 0 times -inf would be NaN.
    return total.log() - bits.clamp_(min=-1e6).mul_(mass).sum(-1) * LOG2 / total


def _row_plan(task: StatsTask, models: int) -> RowPlan:
    return RowPlan(
        mixture=(("forward_kl", 1.0),) if models > 1 else (),
        beta=0.5,
        skew=0.1,
        temperature=task.temperature,
        value_scale=1.0,
        shared=task.shared,
        with_ce=task.labels is not None,
        with_gradient=False,
    )


def _warp_(logits: Tensor, bend: Warp) -> Tensor:
    if bend.scale != 1.0:
        logits.mul_(bend.scale)
    if bend.softcap:
        logits.div_(bend.softcap).tanh_().mul_(bend.softcap)
    return logits


def _check_options(temperature: float, chunk_mb: float | None) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if chunk_mb is not None and not chunk_mb > 0:
        raise ValueError(f"chunk_mb must be above 0, got {chunk_mb}")


_PATHS = {"reference": _reference, "chunked": _chunked}
