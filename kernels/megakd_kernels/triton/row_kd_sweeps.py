"""The sweeps of one program over the ids of one row of student and teacher logits.

Sweep 1 computes maxima and sums online, which give the two KL divergences and cross-entropy.
Losses that mix p and q need normalised probabilities, so sweep 2 computes their means. The last
sweep writes the gradient. Formulas and names are those of `row_mixtures`.

Numerics: row maxima and sums are kept separate. The gap is formed from raw logits, and the
difference of the maxima is subtracted before rounding. Running values are kept for every lane (a
few adjacent ids of a block, in one thread) and joined once, in fp64, so that no step of a loop
waits for another thread.
"""

# No `from __future__ import annotations`: Triton reads the tl.constexpr annotations as objects.
# Triton's type annotations describe Python calls, not compiled kernels.
# pyright: reportArgumentType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from megakd_kernels.triton.row_math import (
    BIASED,
    LOG2_E,
    MINUS_INFINITY,
    expm1,
    gap_of,
    log_mixture,
    sign,
    warp_slope,
    warped,
)

# Computed parts, as bits of PARTS.
FORWARD_KL = tl.constexpr(1)
REVERSE_KL = tl.constexpr(2)
JSD = tl.constexpr(4)
SKEW_KL = tl.constexpr(8)
SKEW_RKL = tl.constexpr(16)
TVD = tl.constexpr(32)
MIXED = tl.constexpr(4 + 8 + 16 + 32)
# With a teacher; with cross-entropy; with a temperature other than 1; with a gradient.
SOFT = tl.constexpr(64)
HARD = tl.constexpr(128)
TEMPERED = tl.constexpr(256)
GRADIENT = tl.constexpr(512)
# With the entropy of the teacher.
ENTROPY = tl.constexpr(1024)

# Whether a block may exceed the ids, and whether it is read again.
_RAGGED = tl.constexpr(1)
_FULL = tl.constexpr(0)
_AGAIN = tl.constexpr(1)
_ONCE = tl.constexpr(0)

# Number of adjacent ids per lane; a thread loads this many ids at once.
LANE = tl.constexpr(4)
# exp(80) is finite in fp32, and a probability below exp(-80) does not change a sum with 1.
_LARGEST_GAP = tl.constexpr(80.0)


@triton.jit
def logits_of(
    row, ids, limit, warp, WARP: tl.constexpr, RAGGED: tl.constexpr, AGAIN: tl.constexpr
) -> tl.tensor:
    """Return the logits of a block of ids in fp32, -inf beyond the limit."""
    policy: tl.constexpr = "" if AGAIN else "evict_first"
    if RAGGED:
        known = ids < limit
        raw = tl.load(row + ids, mask=known, other=MINUS_INFINITY, eviction_policy=policy)
        if BIASED & WARP:
            raw = raw.to(tl.float32) + tl.load(warp[2] + ids, mask=known, other=0.0)
        # Masked again: a scale may be negative, and a cap is finite.
        return tl.where(known, warped(raw, warp[0], warp[1], WARP), MINUS_INFINITY)
    raw = tl.load(row + ids, eviction_policy=policy)
    if BIASED & WARP:
        raw = raw.to(tl.float32) + tl.load(warp[2] + ids)
    return warped(raw, warp[0], warp[1], WARP)


@triton.jit
def logit_of(row, position, warp, WARP: tl.constexpr) -> tl.tensor:
    """Return the logit of one id in fp32."""
    raw = tl.load(row + position)
    if BIASED & WARP:
        raw = raw.to(tl.float32) + tl.load(warp[2] + position)
    return warped(raw, warp[0], warp[1], WARP)


@triton.jit
def by_lane(values) -> tl.tensor:
    """Return the ids of a block as [lanes, LANE]."""
    return tl.reshape(values, (values.shape[0] // LANE, LANE))


@triton.jit
def lane_sum(values) -> tl.tensor:
    """Return the sums of the lanes of a block, added up in fp32, as fp64."""
    return tl.sum(by_lane(values), 1).to(tl.float64)


@triton.jit
def base_of(peak) -> tl.tensor:
    """Return the value to subtract before exp; without a finite logit the sum is 0, not NaN."""
    return tl.where(peak == MINUS_INFINITY, 0.0, peak)


@triton.jit
def _add_statistics(
    state, rows, ids, shared, shift, bits, warp_s, warp_t,
    PARTS: tl.constexpr, WARP_S: tl.constexpr, WARP_T: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add a block of shared ids to the running maxima and sums of the lanes."""
    old, old_t, q_sum, p_sum, hard_sum, forward, reverse, common, depth = state
    s = by_lane(logits_of(rows[0], ids, shared, warp_s, WARP_S, RAGGED, _AGAIN))
    t = by_lane(logits_of(rows[1], ids, shared, warp_t, WARP_T, RAGGED, _AGAIN))
    peak, peak_t = tl.maximum(old, tl.max(s, 1)), tl.maximum(old_t, tl.max(t, 1))
    base, base_t = base_of(peak), base_of(peak_t)
    decay = tl.exp2((old - base) * bits).to(tl.float64)
    decay_t = tl.exp2((old_t - base_t) * bits).to(tl.float64)
    q, p = tl.exp2((s - base[:, None]) * bits), tl.exp2((t - base_t[:, None]) * bits)
    if ENTROPY & PARTS:
        moved = tl.where(old_t == MINUS_INFINITY, 0.0, old_t - base_t)
        depth = (depth + p_sum * moved.to(tl.float64)) * decay_t
        # An id of probability 0 may be infinitely far below.
        depth += tl.sum(tl.where(p > 0, p * (t - base_t[:, None]), 0.0), 1).to(tl.float64)
    q_sum = q_sum * decay + tl.sum(q, 1).to(tl.float64)
    p_sum = p_sum * decay_t + tl.sum(p, 1).to(tl.float64)
    if HARD & PARTS and TEMPERED & PARTS:
        hard = tl.exp2((s - base[:, None]) * LOG2_E)
        hard_sum = hard_sum * tl.exp2((old - base) * LOG2_E).to(tl.float64)
        hard_sum += tl.sum(hard, 1).to(tl.float64)
    if (FORWARD_KL | REVERSE_KL) & PARTS:
        gap = gap_of(s, t, shift)
        if FORWARD_KL & PARTS:
            forward = forward * decay_t + tl.sum(p * gap, 1).to(tl.float64)
        if REVERSE_KL & PARTS:
            reverse = reverse * decay + tl.sum(q * gap, 1).to(tl.float64)
    # A common maximum is in this block, or in an earlier block if neither maximum is new.
    here = (s == peak[:, None]) & (t == peak_t[:, None])
    is_old = (peak == old) & (peak_t == old_t)
    common = tl.maximum(tl.max(here.to(tl.int32), 1), tl.where(is_old, common, 0))
    return peak, peak_t, q_sum, p_sum, hard_sum, forward, reverse, common, depth


@triton.jit
def _add_hard(state, student, ids, width, warp, WARP: tl.constexpr, RAGGED: tl.constexpr):
    """Add ids that only the student has to the softmax of cross-entropy."""
    old, total = state
    s = by_lane(logits_of(student, ids, width, warp, WARP, RAGGED, _AGAIN))
    peak = tl.maximum(old, tl.max(s, 1))
    base = base_of(peak)
    total = total * tl.exp2((old - base) * LOG2_E).to(tl.float64)
    return peak, total + tl.sum(tl.exp2((s - base[:, None]) * LOG2_E), 1).to(tl.float64)


@triton.jit
def _first_shift(
    rows, shared, warp_s, warp_t,
    WARP_S: tl.constexpr, WARP_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return a typical gap between the logits of the models, which keeps sums of gaps small."""
    ids = tl.arange(0, BLOCK)
    peak = tl.max(logits_of(rows[0], ids, shared, warp_s, WARP_S, _RAGGED, _AGAIN), 0)
    peak_t = tl.max(logits_of(rows[1], ids, shared, warp_t, WARP_T, _RAGGED, _AGAIN), 0)
    is_finite = (peak > MINUS_INFINITY) & (peak_t > MINUS_INFINITY)
    return tl.where(is_finite, peak_t - peak, 0.0)


@triton.jit
def _decay(lanes, peak, bits):
    """Return the factor of the lanes' sums; NaN for a row without a finite logit."""
    return tl.exp2((lanes - peak) * bits).to(tl.float64)


@triton.jit
def statistics(
    rows, shared, width, bits, warp_s, warp_t,
    PARTS: tl.constexpr, WARP_S: tl.constexpr, WARP_T: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Run sweep 1.

    Returns the maxima of student, teacher and cross-entropy, their sums of exp, the sums of
    p_exp (t - s) and q_exp (t - s), whether both maxima are at the same id, and the sum of
    p_exp (t - maximum).
    """
    block = tl.arange(0, BLOCK)
    lowest = tl.full([BLOCK // LANE], MINUS_INFINITY, tl.float32)
    zero = tl.zeros([BLOCK // LANE], tl.float64)
    state = (
        lowest, lowest, zero, zero, zero, zero, zero, tl.zeros([BLOCK // LANE], tl.int32), zero
    )  # fmt: skip
    first = 0
    shift = 0.0
    if SOFT & PARTS:
        if (FORWARD_KL | REVERSE_KL) & PARTS:
            shift = _first_shift(rows, shared, warp_s, warp_t, WARP_S, WARP_T, BLOCK)
        first = shared
        whole = shared // BLOCK * BLOCK
        for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
            state = _add_statistics(
                state, rows, start + block, shared, shift, bits, warp_s, warp_t,
                PARTS, WARP_S, WARP_T, _FULL,
            )  # fmt: skip
        if whole < shared:
            state = _add_statistics(
                state, rows, whole + block, shared, shift, bits, warp_s, warp_t,
                PARTS, WARP_S, WARP_T, _RAGGED,
            )  # fmt: skip
    peaks, peaks_t, q_sum, p_sum, hard_sum, forward, reverse, common, depth = state
    hard = (peaks, q_sum)
    if TEMPERED & PARTS:
        hard = (peaks, hard_sum)
    if HARD & PARTS:
        whole = first + (width - first) // BLOCK * BLOCK
        for start in range(first, whole, BLOCK):
            hard = _add_hard(hard, rows[0], start + block, width, warp_s, WARP_S, _FULL)
        if whole < width:
            hard = _add_hard(hard, rows[0], whole + block, width, warp_s, WARP_S, _RAGGED)
    peak, peak_t, hard_peak = tl.max(peaks, 0), tl.max(peaks_t, 0), tl.max(hard[0], 0)
    decay, decay_t = _decay(peaks, peak, bits), _decay(peaks_t, peak_t, bits)
    q_total, p_total = tl.sum(q_sum * decay, 0), tl.sum(p_sum * decay_t, 0)
    hard_total = tl.sum(hard[1] * _decay(hard[0], hard_peak, LOG2_E), 0)
    forward = tl.sum(forward * decay_t, 0) + p_total * shift
    reverse = tl.sum(reverse * decay, 0) + q_total * shift
    is_common = tl.max(tl.where((peaks == peak) & (peaks_t == peak_t), common, 0), 0)
    below = 0.0
    if ENTROPY & PARTS:
        moved = tl.where(p_sum > 0, peaks_t - peak_t, 0.0)
        below = tl.sum((depth + p_sum * moved.to(tl.float64)) * decay_t, 0)
    return (
        peak, peak_t, hard_peak, q_total, p_total, hard_total, forward, reverse, is_common, below
    )  # fmt: skip


@triton.jit
def chance_of_match(
    rows, summary, target, label, shared, width, warp_s, warp_t,
    PARTS: tl.constexpr, WARP_S: tl.constexpr, WARP_T: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the probability that both models draw the same of their equal maxima.

    Without a teacher, it is the probability that the student draws the label.
    """
    peak, peak_t, hard_peak, q_sum, p_sum, hard_sum, _, _, common, _ = summary
    if SOFT & PARTS:
        chance, may_tie, end = common.to(tl.float32), (q_sum >= 2) | (p_sum >= 2), shared
    else:
        chance, may_tie, end = (target == hard_peak).to(tl.float32), hard_sum >= 2, width
        peak = hard_peak
    # Few rows need another sweep: only where a maximum may be one of several.
    if (chance > 0) & may_tie:
        ours, theirs, both = 0.0, 0.0, 0.0  # scalars, because lanes would take registers
        for start in range(0, end, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            top = logits_of(rows[0], ids, end, warp_s, WARP_S, _RAGGED, _AGAIN) == peak
            if SOFT & PARTS:
                top_t = logits_of(rows[1], ids, end, warp_t, WARP_T, _RAGGED, _AGAIN) == peak_t
            else:
                top_t = ids == label
            ours += tl.sum(top.to(tl.float32), 0)
            theirs += tl.sum(top_t.to(tl.float32), 0)
            both += tl.sum((top & top_t).to(tl.float32), 0)
        chance = both / (ours * theirs)
    return chance


@triton.jit
def compared(s, t, bits, inverse, reach) -> tuple[tl.tensor, ...]:
    """Return exp of the logits of both models (not normalised), and the gap.

    reach: both maxima, their difference, and the remaining correction of the gap.
    """
    peak, peak_t, difference, rest = reach
    q, p = tl.exp2((s - peak) * bits), tl.exp2((t - peak_t) * bits)
    return q, p, gap_of(s, t, difference) * inverse - rest


@triton.jit
def _add_block_means(
    state, rows, ids, shared, bits, inverse, reach, mixes, warp_s, warp_t,
    PARTS: tl.constexpr, WARP_S: tl.constexpr, WARP_T: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Add a block of shared ids to the lanes' sums of `means`."""
    jsd_p, jsd_q, skew_p, skew_q, skew_r, skew_v, tvd_p, tvd_q = state
    s = logits_of(rows[0], ids, shared, warp_s, WARP_S, RAGGED, _AGAIN)
    t = logits_of(rows[1], ids, shared, warp_t, WARP_T, RAGGED, _AGAIN)
    q, p, gap = compared(s, t, bits, inverse, reach)
    gap = tl.minimum(tl.maximum(gap, -_LARGEST_GAP), _LARGEST_GAP)
    if JSD & PARTS:
        mix, _ = log_mixture(gap, mixes[0])
        jsd_p += lane_sum(p * (gap - mix))
        jsd_q += lane_sum(q * mix)
    if SKEW_KL & PARTS:
        mix, tilt = log_mixture(gap, mixes[1])
        skew_p += lane_sum(p * (gap - mix))
        skew_q += lane_sum(q * tilt)
    if SKEW_RKL & PARTS:
        mix, tilt = log_mixture(gap, mixes[2])
        skew_r += lane_sum(q * mix)
        skew_v += lane_sum(q * tilt)
    if TVD & PARTS:
        # p - q = p (1 - exp(-gap)) keeps its digits if p is close to q.
        tvd_p -= lane_sum(p * expm1(-tl.maximum(gap, 0.0)))
        tvd_q += lane_sum(q * sign(gap))
    return jsd_p, jsd_q, skew_p, skew_q, skew_r, skew_v, tvd_p, tvd_q


@triton.jit
def means(
    rows, shared, bits, inverse, reach, sums, mixes, warp_s, warp_t,
    PARTS: tl.constexpr, WARP_S: tl.constexpr, WARP_T: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Run sweep 2: return means over p or q, 0 if unused.

    Returns: over p of log(p / m) and over q of log(m / q) for the JSD; over p of log(p / m) and
    over q of the tilt for the skew KL; over q of log(m / q) and of the tilt for the skew reverse
    KL; over p of max(1 - q / p, 0) and over q of sign(p - q) for the total variation.
    """
    block = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK // LANE], tl.float64)
    state = (zero, zero, zero, zero, zero, zero, zero, zero)
    if MIXED & PARTS:
        whole = shared // BLOCK * BLOCK
        for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
            state = _add_block_means(
                state, rows, start + block, shared, bits, inverse, reach, mixes,
                warp_s, warp_t, PARTS, WARP_S, WARP_T, _FULL,
            )  # fmt: skip
        if whole < shared:
            state = _add_block_means(
                state, rows, whole + block, shared, bits, inverse, reach, mixes,
                warp_s, warp_t, PARTS, WARP_S, WARP_T, _RAGGED,
            )  # fmt: skip
    jsd_p, jsd_q, skew_p, skew_q, skew_r, skew_v, tvd_p, tvd_q = state
    q_sum, p_sum = sums
    return (
        tl.sum(jsd_p, 0) / p_sum, tl.sum(jsd_q, 0) / q_sum,
        tl.sum(skew_p, 0) / p_sum, tl.sum(skew_q, 0) / q_sum,
        tl.sum(skew_r, 0) / q_sum, tl.sum(skew_v, 0) / q_sum,
        tl.sum(tvd_p, 0) / p_sum, tl.sum(tvd_q, 0) / q_sum,
    )  # fmt: skip


@triton.jit
def _store(gradient, ids, values, limit, RAGGED: tl.constexpr):
    values = values.to(gradient.dtype.element_ty)
    if RAGGED:
        tl.store(gradient + ids, values, mask=ids < limit)
    else:
        tl.store(gradient + ids, values)


@triton.jit
def _write_soft(
    gradient, rows, ids, shared, bits, inverse, reach, factors, mixes, hard, warp_s, warp_t,
    PARTS: tl.constexpr, WARP_S: tl.constexpr, WARP_T: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of shared ids with respect to the student's logits.

    It is q_exp (constant + slopes) / q_sum - teacher * p_exp, plus the gradient of cross-entropy.
    """
    s = logits_of(rows[0], ids, shared, warp_s, WARP_S, RAGGED, _ONCE)
    t = logits_of(rows[1], ids, shared, warp_t, WARP_T, RAGGED, _ONCE)
    q, p, gap = compared(s, t, bits, inverse, reach)
    q_scale, p_scale, constant, on_reverse, on_jsd, on_skew, on_skew_reverse, on_tvd = factors
    hard_peak, hard_scale, label, ce_factor = hard
    slopes = tl.zeros_like(q)
    if REVERSE_KL & PARTS:
        # The gradient is 0 if q is 0: the gap is limited so that no factor makes it infinite.
        slopes -= on_reverse * tl.minimum(tl.maximum(gap, -1e30), 1e6)
    if MIXED & PARTS:
        gap = tl.minimum(tl.maximum(gap, -_LARGEST_GAP), _LARGEST_GAP)
        if JSD & PARTS:
            slopes -= on_jsd * log_mixture(gap, mixes[0])[0]
        if SKEW_KL & PARTS:
            slopes -= on_skew * log_mixture(gap, mixes[1])[1]
        if SKEW_RKL & PARTS:
            mix, tilt = log_mixture(gap, mixes[2])
            slopes -= on_skew_reverse * (mix - tilt)
        if TVD & PARTS:
            slopes -= on_tvd * sign(gap)
    values = q * (q_scale * (constant + slopes))
    if FORWARD_KL & PARTS:
        values -= p * p_scale
    if HARD & PARTS:
        if TEMPERED & PARTS:
            values += hard_scale * tl.exp2((s - hard_peak) * LOG2_E)
        values = tl.where(ids == label, values - ce_factor, values)
    _store(gradient, ids, warp_slope(values, s, warp_s[0], warp_s[1], WARP_S), shared, RAGGED)


@triton.jit
def _write_hard(
    gradient, student, ids, width, hard, warp,
    PARTS: tl.constexpr, WARP: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of ids that only the student has."""
    hard_peak, hard_scale, label, ce_factor = hard
    if HARD & PARTS:
        s = logits_of(student, ids, width, warp, WARP, RAGGED, _ONCE)
        values = hard_scale * tl.exp2((s - hard_peak) * LOG2_E)
        values = tl.where(ids == label, values - ce_factor, values)
        _store(gradient, ids, warp_slope(values, s, warp[0], warp[1], WARP), width, RAGGED)
    else:
        _store(gradient, ids, tl.zeros_like(ids).to(tl.float32), width, RAGGED)


@triton.jit
def write_gradient(
    gradient, rows, shared, width, bits, inverse, reach, factors, mixes, hard, warp_s, warp_t,
    PARTS: tl.constexpr, WARP_S: tl.constexpr, WARP_T: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Run the last sweep; `gradient` may overwrite the student's row, block after block.

    factors: see `_write_soft`. hard: cross-entropy's maximum, factor / sum, label, factor.
    """
    block = tl.arange(0, BLOCK)
    first = 0
    if SOFT & PARTS:
        first = shared
        whole = shared // BLOCK * BLOCK
        for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
            _write_soft(
                gradient, rows, start + block, shared, bits, inverse, reach, factors,
                mixes, hard, warp_s, warp_t, PARTS, WARP_S, WARP_T, _FULL,
            )  # fmt: skip
        if whole < shared:
            _write_soft(
                gradient, rows, whole + block, shared, bits, inverse, reach, factors,
                mixes, hard, warp_s, warp_t, PARTS, WARP_S, WARP_T, _RAGGED,
            )  # fmt: skip
    whole = first + (width - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        _write_hard(gradient, rows[0], start + block, width, hard, warp_s, PARTS, WARP_S, _FULL)
    if whole < width:
        _write_hard(gradient, rows[0], whole + block, width, hard, warp_s, PARTS, WARP_S, _RAGGED)


@triton.jit
def write_zeros(gradient, width, BLOCK: tl.constexpr) -> None:
    """Write zeros for a row that does not count."""
    block = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        _store(gradient, start + block, tl.zeros([BLOCK], tl.float32), width, _RAGGED)
