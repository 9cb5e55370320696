"""Statistics of two LM heads in one sweep that stores no logit.

A program owns a tile of rows and a stretch of the vocabulary. For each block of ids it multiplies
the hidden states with both heads, tile by tile, and adds the logits to running sums. It stores
eleven numbers per row and stretch, which `_joined` adds up. Row maxima and sums are kept
separate. The gap between the models is formed from raw logits, because the difference of close
logits is exact. Terms of a block are summed in fp32, blocks in fp64.
Shapes: N rows, V vocabulary, H width.
"""

# No `from __future__ import annotations`: Triton reads the tl.constexpr annotations as objects.
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd_kernels.linear_chunks import Side
from megakd_kernels.row_plan import Warp
from megakd_kernels.statistics import RowStats, StatsTask
from megakd_kernels.triton import launching
from megakd_kernels.triton.launching import Card, warp_kind
from megakd_kernels.triton.row_math import LOG2_E, warped

# Finite, so that no difference is NaN. A hidden logit is as far below the first maximum as the
# first maximum is below every real logit, so that its exponential is 0 relative to both.
_FIRST_MAXIMUM = tl.constexpr(-1e30)
_HIDDEN = tl.constexpr(-2e30)

_FIELDS = 11
# Programs per multiprocessor, enough to make the cost of the last wave small.
_WAVES = 4
# Fewest blocks of ids per program; with fewer blocks, starting and storing take most time.
_FEWEST_BLOCKS = 8


@triton.jit
def _logits(
    hidden, weight, bias, rows, counted, ids, known,
    hidden_row, hidden_step, weight_row, weight_step, scale, softcap,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IDS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, UPCAST: tl.constexpr, HAS_BIAS: tl.constexpr,
    WARP: tl.constexpr,
):  # fmt: skip
    """Return logits [BLOCK_ROWS, BLOCK_IDS] in fp32; undefined for masked rows and ids."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_IDS], tl.float32)
    # An index times a stride may exceed int32.
    row_starts = hidden + rows.to(tl.int64)[:, None] * hidden_row
    id_starts = weight + ids.to(tl.int64)[None, :] * weight_row
    for start in range(0, WIDTH, BLOCK_WIDTH):
        columns = start + tl.arange(0, BLOCK_WIDTH)
        row_mask = counted[:, None]
        id_mask = known[None, :]
        if WIDTH % BLOCK_WIDTH != 0:
            row_mask = row_mask & (columns < WIDTH)[None, :]
            id_mask = id_mask & (columns < WIDTH)[:, None]
        places = columns.to(tl.int64)
        x = tl.load(row_starts + places[None, :] * hidden_step, mask=row_mask, other=0.0)
        w = tl.load(id_starts + places[:, None] * weight_step, mask=id_mask, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + ids, mask=known, other=0.0).to(tl.float32)[None, :]
    return warped(total, scale, softcap, WARP)


@triton.jit
def _total(values):
    return tl.sum(values, 1).to(tl.float64)


@triton.jit
def _statistics_kernel(
    hidden_s, weight_s, bias_s, hidden_t, weight_t, bias_t, valid, labels, partials,
    hidden_row_s, hidden_step_s, weight_row_s, weight_step_s, scale_s, softcap_s,
    hidden_row_t, hidden_step_t, weight_row_t, weight_step_t, scale_t, softcap_t,
    count, used, shared, stretch, plane, steepness,
    WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_IDS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    UPCAST_S: tl.constexpr, UPCAST_T: tl.constexpr,
    HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr,
    WARP_S: tl.constexpr, WARP_T: tl.constexpr,
    HAS_TEACHER: tl.constexpr, HAS_LABELS: tl.constexpr, OWN_HARD: tl.constexpr,
):  # fmt: skip
    """Store partial sums [fields, stretches, N] of one tile of rows over one stretch of ids.

    steepness: log2(e) / temperature, which converts logits to exponents of 2.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    within = rows < count
    counted = tl.load(valid + rows, mask=within, other=0) != 0
    label = tl.zeros([BLOCK_ROWS], tl.int64)
    if HAS_LABELS:
        label = tl.load(labels + rows, mask=counted, other=0)
    max_s = tl.full([BLOCK_ROWS], _FIRST_MAXIMUM, tl.float32)
    max_t = tl.full([BLOCK_ROWS], _FIRST_MAXIMUM, tl.float32)
    max_hard = tl.full([BLOCK_ROWS], _FIRST_MAXIMUM, tl.float32)
    sum_s = tl.zeros([BLOCK_ROWS], tl.float64)
    sum_t = tl.zeros([BLOCK_ROWS], tl.float64)
    sum_hard = tl.zeros([BLOCK_ROWS], tl.float64)
    gap = tl.zeros([BLOCK_ROWS], tl.float64)
    depth = tl.zeros([BLOCK_ROWS], tl.float64)
    shift = tl.zeros([BLOCK_ROWS], tl.float32)
    common = tl.zeros([BLOCK_ROWS], tl.int32)
    target = tl.zeros([BLOCK_ROWS], tl.float32)

    first = tl.program_id(1) * stretch
    last = tl.minimum(first + stretch, used)
    # Rows of prompts and padding are adjacent: a tile without a row that counts skips all products.
    last = first + (last - first) * tl.max(counted.to(tl.int32), 0)
    for start in range(first, last, BLOCK_IDS):
        ids = start + tl.arange(0, BLOCK_IDS)
        s = _logits(
            hidden_s, weight_s, bias_s, rows, counted, ids, ids < used,
            hidden_row_s, hidden_step_s, weight_row_s, weight_step_s, scale_s, softcap_s,
            WIDTH_S, BLOCK_ROWS, BLOCK_IDS, BLOCK_WIDTH, UPCAST_S, HAS_BIAS_S, WARP_S,
        )  # fmt: skip
        if HAS_LABELS:
            target += tl.sum(tl.where(ids[None, :] == label[:, None], s, 0.0), 1)
        if OWN_HARD:
            hard = tl.where((ids < used)[None, :], s, _HIDDEN)
            new_hard = tl.maximum(max_hard, tl.max(hard, 1))
            sum_hard *= tl.exp2((max_hard - new_hard) * LOG2_E)
            sum_hard += _total(tl.exp2((hard - new_hard[:, None]) * LOG2_E))
            max_hard = new_hard
        if HAS_TEACHER:
            is_shared = ids < shared
            t = _logits(
                hidden_t, weight_t, bias_t, rows, counted, ids, is_shared,
                hidden_row_t, hidden_step_t, weight_row_t, weight_step_t, scale_t, softcap_t,
                WIDTH_T, BLOCK_ROWS, BLOCK_IDS, BLOCK_WIDTH, UPCAST_T, HAS_BIAS_T, WARP_T,
            )  # fmt: skip
            s = tl.where(is_shared[None, :], s, _HIDDEN)
            t = tl.where(is_shared[None, :], t, _HIDDEN)
            new_s = tl.maximum(max_s, tl.max(s, 1))
            new_t = tl.maximum(max_t, tl.max(t, 1))
            is_top = (s == new_s[:, None]) & (t == new_t[:, None])
            still = (new_s == max_s) & (new_t == max_t)
            common = tl.maximum(tl.max(is_top.to(tl.int32), 1), tl.where(still, common, 0))
            sum_s *= tl.exp2((max_s - new_s) * steepness)
            sum_s += _total(tl.exp2((s - new_s[:, None]) * steepness))
            # Subtract the gap of the first maxima, so that a large common shift costs no digits.
            is_first = (max_t == _FIRST_MAXIMUM) & (new_s > _FIRST_MAXIMUM)
            shift = tl.where(is_first, new_t - new_s, shift)
            below = t - new_t[:, None]
            mass = tl.exp2(below * steepness)
            moved = max_t - new_t
            decay = tl.exp2(moved * steepness)
            # The product of 0 and an infinite gap or depth is 0: the teacher's probability is 0.
            gap = tl.where(decay > 0, gap * decay, 0.0)
            gap += _total(tl.where(mass > 0, mass * ((t - s) - shift[:, None]), 0.0))
            depth = decay * (depth + sum_t * moved)
            depth += _total(tl.where(mass > 0, mass * below, 0.0))
            sum_t = decay * sum_t + _total(mass)
            max_s = new_s
            max_t = new_t

    place = partials + tl.program_id(1).to(tl.int64) * count + rows
    if HAS_TEACHER:
        tl.store(place, max_s, mask=within)
        tl.store(place + plane, sum_s, mask=within)
        tl.store(place + 2 * plane, max_t, mask=within)
        tl.store(place + 3 * plane, sum_t, mask=within)
        tl.store(place + 4 * plane, gap, mask=within)
        tl.store(place + 5 * plane, depth, mask=within)
        tl.store(place + 6 * plane, shift, mask=within)
        tl.store(place + 7 * plane, common, mask=within)
    if OWN_HARD:
        tl.store(place + 8 * plane, max_hard, mask=within)
        tl.store(place + 9 * plane, sum_hard, mask=within)
    if HAS_LABELS:
        tl.store(place + 10 * plane, target, mask=within)


class _Tiling(NamedTuple):
    """Rows, ids and width of a tile, and the launch options."""

    rows: int
    ids: int
    width: int
    stretches: int
    warps: int
    stages: int


def tiled_stats(student: Side, teacher: Side | None, task: StatsTask) -> RowStats:
    """Compute the statistics per row in fp32; values of rows that are not valid are undefined.

    Args:
        student: head with all ids.
        teacher: head with the shared ids, or None.
        task: see `StatsTask`; chunk_mb is not read.
    """
    count = len(student.hidden)
    used = task.shared if task.labels is None else len(student.weight)
    shares_softmax = task.temperature == 1.0 and task.shared == used
    own_hard = task.labels is not None and (teacher is None or not shares_softmax)
    tiling = _tiling(student, teacher, used)
    partials = student.hidden.new_empty(_FIELDS, tiling.stretches, count, dtype=torch.float64)
    if count == 0:
        return RowStats(*partials.new_zeros(4, 0).float().unbind(0))
    soft = student if teacher is None else teacher
    blocks = triton.cdiv(used, tiling.ids)
    # A launch uses the current device, which may differ from the device of the tensors.
    kernel: Any = _statistics_kernel
    with torch.cuda.device_of(student.hidden):
        kernel[(triton.cdiv(count, tiling.rows), tiling.stretches)](
            *_tensors(student),
            *_tensors(soft),
            task.valid.contiguous().view(torch.uint8),
            partials if task.labels is None else task.labels.contiguous(),
            partials,
            *_strides(student, task.student_warp),
            *_strides(soft, task.teacher_warp),
            count,
            used,
            task.shared,
            triton.cdiv(blocks, tiling.stretches) * tiling.ids,
            tiling.stretches * count,
            math.log2(math.e) / task.temperature,
            WIDTH_S=student.weight.shape[1],
            WIDTH_T=soft.weight.shape[1],
            BLOCK_ROWS=tiling.rows,
            BLOCK_IDS=tiling.ids,
            BLOCK_WIDTH=tiling.width,
            UPCAST_S=_multiplies_wide(student),
            UPCAST_T=_multiplies_wide(soft),
            HAS_BIAS_S=student.bias is not None,
            HAS_BIAS_T=soft.bias is not None,
            WARP_S=warp_kind(task.student_warp),
            WARP_T=warp_kind(task.teacher_warp),
            HAS_TEACHER=teacher is not None,
            HAS_LABELS=task.labels is not None,
            OWN_HARD=own_hard,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
    return _joined(partials, task, has_teacher=teacher is not None, own_hard=own_hard)


def _joined(partials: Tensor, task: StatsTask, *, has_teacher: bool, own_hard: bool) -> RowStats:
    """Join the sums of the stretches to row statistics, in fp64 because the tensors are small."""
    max_s, sum_s, max_t, sum_t, gap, depth, shift, common, max_hard, sum_hard, target = partials
    ce = kl = entropy = torch.zeros_like(max_s[0])
    peak, total = _merge(max_hard, sum_hard, 1.0) if own_hard else _merge(max_s, sum_s, 1.0)
    goal = target.sum(0)
    if task.labels is not None:
        ce = peak - goal + total.log()
    agrees = goal == peak
    if has_teacher:
        temperature = task.temperature
        peak_s, total_s = _merge(max_s, sum_s, temperature)
        peak_t, total_t = _merge(max_t, sum_t, temperature)
        moved = max_t - peak_t
        decay = (moved / temperature).exp()
        offset = peak_t - peak_s
        gaps = decay * (gap + sum_t * (shift - offset))
        gaps = torch.where(decay > 0, gaps, 0).sum(0) / total_t
        # Rounding may give -1e-8 if the exact value is 0.
        kl = (gaps / temperature - (total_t / total_s).log()).clamp(min=0)
        depths = (decay * (depth + sum_t * moved)).sum(0) / total_t
        entropy = total_t.log() - depths / temperature
        agrees = ((common > 0) & (max_s == peak_s) & (max_t == peak_t)).any(0)
    return RowStats(kl.float(), ce.float(), entropy.float(), agrees.float())


def _merge(maxima: Tensor, sums: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return maximum and sum of exponentials of whole rows, [stretches, N] -> [N] each."""
    peak = maxima.amax(0)
    return peak, (sums * ((maxima - peak) / temperature).exp()).sum(0)


def _tensors(side: Side) -> tuple[Tensor, Tensor, Tensor]:
    bias = side.weight if side.bias is None else side.bias.contiguous()
    return side.hidden, side.weight, bias


def _strides(side: Side, warp: Warp) -> tuple[float, ...]:
    return (*side.hidden.stride(), *side.weight.stride(), warp.scale, warp.softcap or 1.0)


def _multiplies_wide(side: Side) -> bool:
    """Return whether products run in fp32: if the dtypes differ, and in the interpreter."""
    return side.hidden.dtype != side.weight.dtype or launching.card_of(side.hidden) is None


def _tiling(student: Side, teacher: Side | None, used: int) -> _Tiling:
    card = launching.card_of(student.hidden)
    if card is None:
        return _Tiling(rows=16, ids=32, width=32, stretches=2, warps=4, stages=1)
    sides = [student] if teacher is None else [student, teacher]
    is_narrow = all(not _multiplies_wide(side) and side.weight.itemsize == 2 for side in sides)
    rows, ids = (128, 128) if is_narrow else (64, 64)
    return _Tiling(
        rows=rows, ids=ids, width=64 if is_narrow else 32,
        stretches=_stretches(card, triton.cdiv(len(student.hidden), rows), triton.cdiv(used, ids)),
        warps=8 if is_narrow else 4, stages=3,
    )  # fmt: skip


def _stretches(card: Card, tiles: int, blocks: int) -> int:
    """Return the number of stretches of the vocabulary that keeps the processors busy."""
    wanted = triton.cdiv(_WAVES * card.processors, max(tiles, 1))
    return max(1, min(wanted, blocks // _FEWEST_BLOCKS))
