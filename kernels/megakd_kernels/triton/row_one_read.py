"""Distillation losses of whole rows of logits with a gradient, reading every logit once.

The two models' logits of a row lie in the registers of several programs, a segment in each. The
programs of a row store the sums of their segments and meet; each then adds up the sums of all
segments. Losses that mix p and q meet once more, for their means. At last each program writes its
part of the gradient. Memory moves 10 bytes per id of both models (fp32 logits, a bf16 gradient),
where `row_kd` moves 18 or 26. Formulas and names are those of `row_kd_sweeps`.

A program takes a ticket when it starts, and the ticket names its segment. All programs of an older
row have therefore started, and only a row with more segments than the GPU holds programs could wait
for ever (`fits`). Triton's interpreter runs one program after the other; there, a launch
per phase takes the place of the meetings.
Shapes: R rows, V ids, S segments of a row.
"""

# No `from __future__ import annotations`: Triton reads the tl.constexpr annotations as objects.
# Triton's type annotations describe Python calls, not compiled kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd_kernels.triton import launching
from megakd_kernels.triton.launching import registers
from megakd_kernels.triton.row_kd_sweeps import (
    FORWARD_KL,
    HARD,
    JSD,
    MIXED,
    REVERSE_KL,
    SKEW_KL,
    SKEW_RKL,
    TVD,
    add_means,
    base_of,
    compared,
    hard_gradient,
    lane_sum,
    logit_of,
    logits_of,
    soft_gradient,
)
from megakd_kernels.triton.row_kd_values import (
    ALL,
    FOUND,
    KEPT,
    LAST,
    MEANS,
    STATISTICS,
    reach_of,
    store_values,
)
from megakd_kernels.triton.row_math import (
    LOG2_E,
    MINUS_INFINITY,
    gap_of,
    warp_slope,
)

_RAGGED = tl.constexpr(1)
_ONCE = tl.constexpr(0)

# Ids of a segment: a thread has four adjacent ids of each quarter. The sums take a quarter at a
# time, so that their registers are few beside those of the logits.
SEGMENT = 2048
_IDS_PER_WARP = 128
# Registers of a thread: seven programs of 128 threads fit a multiprocessor of sm_90, and five where
# the gap between the models or the labels' softmax is needed.
_REGISTERS, _MORE_REGISTERS = 72, 96
# Programs that a multiprocessor holds at least, even of a mixture.
_PROGRAMS = 2


@triton.jit
def _shared(s, ids, shared, OWN_IDS: tl.constexpr):
    """Return the student's logits of the shared ids, -inf at those that only the student has."""
    if OWN_IDS:
        return tl.where(ids < shared, s, MINUS_INFINITY)
    return s


@triton.jit
def _add_sums(
    state, s, t, ids, shared, peaks, bits, PARTS: tl.constexpr, OWN_IDS: tl.constexpr
):  # fmt: skip
    """Add a quarter to the lanes' sums, relative to the maxima of the segment."""
    q_sum, p_sum, hard_sum, forward, reverse, common = state
    peak, peak_t, hard_peak = peaks
    base, base_t = base_of(peak), base_of(peak_t)
    own = _shared(s, ids, shared, OWN_IDS)
    q = tl.exp2((own - base) * bits)
    q_sum += lane_sum(q)
    gap = gap_of(own, t, base_t - base)
    if REVERSE_KL & PARTS:
        reverse += lane_sum(q * gap)
    p = tl.exp2((t - base_t) * bits)
    p_sum += lane_sum(p)
    if FORWARD_KL & PARTS:
        forward += lane_sum(p * gap)
    if HARD & PARTS:
        hard_sum += lane_sum(tl.exp2((s - base_of(hard_peak)) * LOG2_E))
    is_top = (own == peak) & (t == peak_t)
    return (
        q_sum,
        p_sum,
        hard_sum,
        forward,
        reverse,
        tl.maximum(common, tl.max(is_top.to(tl.int32), 0)),
    )


@triton.jit
def _sums(
    logits, ids, shared, bits,
    PARTS: tl.constexpr, OWN_IDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Return the maxima and sums of a segment, as `statistics` returns those of a row."""
    s0, s1, s2, s3, t0, t1, t2, t3 = logits
    i0, i1, i2, i3 = ids
    own = tl.maximum(
        tl.maximum(_shared(s0, i0, shared, OWN_IDS), _shared(s1, i1, shared, OWN_IDS)),
        tl.maximum(_shared(s2, i2, shared, OWN_IDS), _shared(s3, i3, shared, OWN_IDS)),
    )
    peak = tl.max(own, 0)
    peak_t = tl.max(tl.maximum(tl.maximum(t0, t1), tl.maximum(t2, t3)), 0)
    hard_peak = peak
    if HARD & PARTS:
        # Ids that only the student has count too.
        hard_peak = tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), 0)
    peaks = (peak, peak_t, hard_peak)
    zero = tl.zeros([LANES], tl.float64)
    state = (zero, zero, zero, zero, zero, tl.zeros([LANES], tl.int32))
    state = _add_sums(state, s0, t0, i0, shared, peaks, bits, PARTS, OWN_IDS)
    state = _add_sums(state, s1, t1, i1, shared, peaks, bits, PARTS, OWN_IDS)
    state = _add_sums(state, s2, t2, i2, shared, peaks, bits, PARTS, OWN_IDS)
    state = _add_sums(state, s3, t3, i3, shared, peaks, bits, PARTS, OWN_IDS)
    q_sum, p_sum = tl.sum(state[0], 0), tl.sum(state[1], 0)
    hard_sum = q_sum
    if HARD & PARTS:
        hard_sum = tl.sum(state[2], 0)
    shift = (base_of(peak_t) - base_of(peak)).to(tl.float64)
    forward = 0.0
    reverse = 0.0
    if FORWARD_KL & PARTS:
        forward = tl.sum(state[3], 0) + p_sum * shift
    if REVERSE_KL & PARTS:
        reverse = tl.sum(state[4], 0) + q_sum * shift
    return peak, peak_t, hard_peak, q_sum, p_sum, hard_sum, forward, reverse, tl.max(state[5], 0)


@triton.jit
def _add_means(
    state, s, t, ids, shared, bits, inverse, reach, mixes,
    PARTS: tl.constexpr, OWN_IDS: tl.constexpr,
):  # fmt: skip
    q, p, gap = compared(_shared(s, ids, shared, OWN_IDS), t, bits, inverse, reach)
    return add_means(state, q, p, gap, mixes, PARTS)


@triton.jit
def _write(
    gradient, s, t, ids, shared, width, bits, inverse, reach, factors, mixes, hard, warp,
    PARTS: tl.constexpr, OWN_IDS: tl.constexpr, WARP: tl.constexpr,
):  # fmt: skip
    q, p, gap = compared(_shared(s, ids, shared, OWN_IDS), t, bits, inverse, reach)
    values = soft_gradient(s, q, p, gap, ids, factors, mixes, hard, PARTS)
    if OWN_IDS:
        values = tl.where(ids < shared, values, hard_gradient(s, ids, hard, PARTS))
    values = warp_slope(values, s, warp[0], warp[1], WARP)
    tl.store(gradient + ids, values.to(gradient.dtype.element_ty), mask=ids < width)


@triton.jit
def _write_zeros(gradient, ids, width):
    zeros = tl.zeros(ids.shape, tl.float32).to(gradient.dtype.element_ty)
    tl.store(gradient + ids, zeros, mask=ids < width)


@triton.jit
def _lanes(place, field: tl.constexpr, plane, other, SEGMENTS: tl.constexpr, PADDED: tl.constexpr):
    """Return a field of all segments of a row, read behind the caches of this multiprocessor."""
    lanes = tl.arange(0, PADDED)
    return tl.load(place + field * plane + lanes, mask=lanes < SEGMENTS, other=other, volatile=True)


@triton.jit
def _decay(peaks, peak, bits):
    # NaN for a row without a finite logit.
    return tl.exp2(((peaks - peak) * bits).to(tl.float32)).to(tl.float64)


@triton.jit
def _joined(
    place, plane, bits, PARTS: tl.constexpr, SEGMENTS: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Return maxima and sums of a row, and the label's logit, from those of its segments."""
    peaks = _lanes(place, 0, plane, MINUS_INFINITY, SEGMENTS, PADDED)
    peaks_t = _lanes(place, 1, plane, MINUS_INFINITY, SEGMENTS, PADDED)
    peak, peak_t = tl.max(peaks, 0), tl.max(peaks_t, 0)
    decay, decay_t = _decay(peaks, peak, bits), _decay(peaks_t, peak_t, bits)
    q_sum = tl.sum(_lanes(place, 3, plane, 0.0, SEGMENTS, PADDED) * decay, 0)
    p_sum = tl.sum(_lanes(place, 4, plane, 0.0, SEGMENTS, PADDED) * decay_t, 0)
    hard_peak = peak
    hard_sum = q_sum
    target = 0.0
    if HARD & PARTS:
        hard_peaks = _lanes(place, 2, plane, MINUS_INFINITY, SEGMENTS, PADDED)
        hard_peak = tl.max(hard_peaks, 0)
        hard_decay = _decay(hard_peaks, hard_peak, LOG2_E)
        hard_sum = tl.sum(_lanes(place, 5, plane, 0.0, SEGMENTS, PADDED) * hard_decay, 0)
        target = tl.sum(_lanes(place, 9, plane, 0.0, SEGMENTS, PADDED), 0).to(tl.float32)
    forward = 0.0
    reverse = 0.0
    if FORWARD_KL & PARTS:
        forward = tl.sum(_lanes(place, 6, plane, 0.0, SEGMENTS, PADDED) * decay_t, 0)
    if REVERSE_KL & PARTS:
        reverse = tl.sum(_lanes(place, 7, plane, 0.0, SEGMENTS, PADDED) * decay, 0)
    is_top = (peaks == peak) & (peaks_t == peak_t)
    both = _lanes(place, 8, plane, 0.0, SEGMENTS, PADDED)
    common = tl.max(tl.where(is_top, both, 0.0), 0)
    found = (
        peak.to(tl.float32), peak_t.to(tl.float32), hard_peak.to(tl.float32), q_sum, p_sum,
        hard_sum, forward, reverse, common, 0.0,
    )  # fmt: skip
    return found, target


@triton.jit
def _mean(
    place, FIELD: tl.constexpr, KIND: tl.constexpr, plane, total,
    PARTS: tl.constexpr, SEGMENTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    mean = tl.full((), 0.0, tl.float64)
    if KIND & PARTS:
        mean = tl.sum(_lanes(place, FOUND + FIELD, plane, 0.0, SEGMENTS, PADDED), 0) / total
    return mean


@triton.jit
def _means(
    place, plane, q_sum, p_sum, PARTS: tl.constexpr, SEGMENTS: tl.constexpr, PADDED: tl.constexpr
):
    """Return the means of a row as `row_kd_sweeps.means` does."""
    return (
        _mean(place, 0, JSD, plane, p_sum, PARTS, SEGMENTS, PADDED),
        _mean(place, 1, JSD, plane, q_sum, PARTS, SEGMENTS, PADDED),
        _mean(place, 2, SKEW_KL, plane, p_sum, PARTS, SEGMENTS, PADDED),
        _mean(place, 3, SKEW_KL, plane, q_sum, PARTS, SEGMENTS, PADDED),
        _mean(place, 4, SKEW_RKL, plane, q_sum, PARTS, SEGMENTS, PADDED),
        _mean(place, 5, SKEW_RKL, plane, q_sum, PARTS, SEGMENTS, PADDED),
        _mean(place, 6, TVD, plane, p_sum, PARTS, SEGMENTS, PADDED),
        _mean(place, 7, TVD, plane, q_sum, PARTS, SEGMENTS, PADDED),
    )


@triton.jit
def _meet(done, count):
    """Wait until `count` programs have come here; what they stored before is seen."""
    tl.debug_barrier()  # all threads have stored
    tl.atomic_add(done, 1, sem="release", scope="gpu")
    while tl.atomic_add(done, 0, sem="acquire", scope="gpu") < count:
        pass


# The number of rows differs between chunks.
@triton.jit(do_not_specialize=["rows"])
def _one_read_kernel(
    student, teacher, bias_s, bias_t, gradient, valid, labels, kd_factor, ce_factor, values, agrees,
    parts, tickets, done, rows, width, shared, stride_s, stride_t, stride_g,
    bits, inverse, value_scale, mixes, scale_s, cap_s, scale_t, cap_t,
    weight_forward, weight_reverse, weight_jsd, weight_skew, weight_skew_reverse, weight_tvd,
    PARTS: tl.constexpr, PHASES: tl.constexpr, WARP_S: tl.constexpr, WARP_T: tl.constexpr,
    OWN_IDS: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Process one segment of a row. parts: [18, R, S] fp64. Others as in `row_kd`."""
    turn = tl.program_id(0)
    if PHASES == ALL:
        turn = tl.atomic_add(tickets, 1, sem="relaxed")
    row = (turn // SEGMENTS).to(tl.int64)  # the product with a stride may exceed int32
    segment = turn % SEGMENTS
    block = segment * (4 * BLOCK) + tl.arange(0, BLOCK)
    i0, i1, i2, i3 = block, block + BLOCK, block + 2 * BLOCK, block + 3 * BLOCK
    gradient += row * stride_g
    if tl.load(valid + row) == 0:
        _write_zeros(gradient, i0, width)
        _write_zeros(gradient, i1, width)
        _write_zeros(gradient, i2, width)
        _write_zeros(gradient, i3, width)
        return
    student += row * stride_s
    teacher += row * stride_t
    warp_s, warp_t = (scale_s, cap_s, bias_s), (scale_t, cap_t, bias_t)
    s0 = logits_of(student, i0, width, warp_s, WARP_S, _RAGGED, _ONCE)
    s1 = logits_of(student, i1, width, warp_s, WARP_S, _RAGGED, _ONCE)
    s2 = logits_of(student, i2, width, warp_s, WARP_S, _RAGGED, _ONCE)
    s3 = logits_of(student, i3, width, warp_s, WARP_S, _RAGGED, _ONCE)
    t0 = logits_of(teacher, i0, shared, warp_t, WARP_T, _RAGGED, _ONCE)
    t1 = logits_of(teacher, i1, shared, warp_t, WARP_T, _RAGGED, _ONCE)
    t2 = logits_of(teacher, i2, shared, warp_t, WARP_T, _RAGGED, _ONCE)
    t3 = logits_of(teacher, i3, shared, warp_t, WARP_T, _RAGGED, _ONCE)
    plane = rows * SEGMENTS
    whole = parts + row * SEGMENTS
    place = whole + segment
    label = tl.full((), -1, tl.int32)
    ce = 0.0
    if HARD & PARTS:
        label = tl.load(labels + row).to(tl.int32)
        ce = tl.load(ce_factor + row)

    if STATISTICS & PHASES:
        logits = (s0, s1, s2, s3, t0, t1, t2, t3)
        sums = _sums(logits, (i0, i1, i2, i3), shared, bits, PARTS, OWN_IDS, BLOCK // 4)
        for field in tl.static_range(9):
            tl.store(place + field * plane, sums[field].to(tl.float64))
        target = 0.0
        if HARD & PARTS:
            # Read before anyone overwrites the row.
            first = segment * (4 * BLOCK)
            is_here = (label >= first) & (label < first + 4 * BLOCK)
            target = logit_of(student, label, is_here, warp_s, WARP_S)
        tl.store(place + 9 * plane, target.to(tl.float64))
    if PHASES == STATISTICS:
        return
    if PHASES == ALL:
        _meet(done + row, SEGMENTS)
    found, target = _joined(whole, plane, bits, PARTS, SEGMENTS, PADDED)
    mean = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    if MIXED & PARTS:
        if MEANS & PHASES:
            reach = reach_of(found, inverse)
            zero = tl.zeros([BLOCK // 4], tl.float64)
            state = (zero, zero, zero, zero, zero, zero, zero, zero)
            state = _add_means(
                state, s0, t0, i0, shared, bits, inverse, reach, mixes, PARTS, OWN_IDS
            )
            state = _add_means(
                state, s1, t1, i1, shared, bits, inverse, reach, mixes, PARTS, OWN_IDS
            )
            state = _add_means(
                state, s2, t2, i2, shared, bits, inverse, reach, mixes, PARTS, OWN_IDS
            )
            state = _add_means(
                state, s3, t3, i3, shared, bits, inverse, reach, mixes, PARTS, OWN_IDS
            )
            for field in tl.static_range(8):
                tl.store(place + (FOUND + field) * plane, tl.sum(state[field], 0))
        if PHASES == MEANS:
            return
        if PHASES == ALL:
            _meet(done + row, 2 * SEGMENTS)
            # Read again, so that nothing but the logits waits in registers.
            found, target = _joined(whole, plane, bits, PARTS, SEGMENTS, PADDED)
        mean = _means(whole, plane, found[3], found[4], PARTS, SEGMENTS, PADDED)
    weights = (
        weight_forward, weight_reverse, weight_jsd, weight_skew, weight_skew_reverse, weight_tvd
    )  # fmt: skip
    reach = reach_of(found, inverse)
    # Every program of the row stores the same values.
    factors, hard_scale = store_values(
        found, reach, mean, target, values, agrees, row, rows, inverse, value_scale, mixes,
        weights, tl.load(kd_factor + row), ce, PARTS,
    )  # fmt: skip
    hard = (found[2], hard_scale, label, ce)
    _write(
        gradient, s0, t0, i0, shared, width, bits, inverse, reach, factors, mixes, hard, warp_s,
        PARTS, OWN_IDS, WARP_S,
    )  # fmt: skip
    _write(
        gradient, s1, t1, i1, shared, width, bits, inverse, reach, factors, mixes, hard, warp_s,
        PARTS, OWN_IDS, WARP_S,
    )  # fmt: skip
    _write(
        gradient, s2, t2, i2, shared, width, bits, inverse, reach, factors, mixes, hard, warp_s,
        PARTS, OWN_IDS, WARP_S,
    )  # fmt: skip
    _write(
        gradient, s3, t3, i3, shared, width, bits, inverse, reach, factors, mixes, hard, warp_s,
        PARTS, OWN_IDS, WARP_S,
    )  # fmt: skip


def fits(student: Tensor) -> bool:
    """Return whether the device holds all programs of a row at a time."""
    if not student.is_cuda:
        return True  # the interpreter does not wait
    processors = torch.cuda.get_device_properties(student.device).multi_processor_count
    return triton.cdiv(student.shape[1], SEGMENT) <= _PROGRAMS * processors


def run_one_read(launch: dict[str, Any], *, block: int | None, is_single: bool) -> None:
    """Launch with the arguments of `row_kd`'s kernel.

    block: ids of a quarter; None: from the width. is_single: whether one divergence has a weight.
    """
    student, count, width = launch["student"], launch["rows"], launch["width"]
    block = block or min(SEGMENT // 4, max(128, triton.next_power_of_2(width) // 4))
    segments = triton.cdiv(width, 4 * block)
    is_large = launch["PARTS"] & (MIXED.value | REVERSE_KL.value | HARD.value)
    usual = _MORE_REGISTERS if is_large else _REGISTERS
    others = {
        **launch,
        "parts": student.new_empty(KEPT, count, segments, dtype=torch.float64),
        "OWN_IDS": launch["shared"] < width,
        "BLOCK": block,
        "SEGMENTS": segments,
        "PADDED": triton.next_power_of_2(segments),
        "num_warps": max(1, block // _IDS_PER_WARP),
        "maxnreg": registers(usual) if is_single else None,
    }
    for name in ("vocab_start", "STAGES"):
        others.pop(name)
    counters = student.new_zeros(1 + count, dtype=torch.int32)
    is_interpreted = launching.shared_memory_of(student) is None
    phases = (STATISTICS, MEANS, LAST) if is_interpreted else (ALL,)
    kernel: Any = _one_read_kernel
    for phase in phases:
        if phase is MEANS and not launch["PARTS"] & MIXED.value:
            continue
        kernel[(count * segments,)](
            **others, tickets=counters, done=counters[1:], PHASES=phase.value
        )
