"""Values of a row from its maxima, sums and means, and the factors of its gradient."""

# No `from __future__ import annotations`: Triton reads the tl.constexpr annotations as objects.
# Triton's type annotations describe Python calls, not compiled kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false
import triton
import triton.language as tl

from megakd_kernels.triton.row_kd_sweeps import (
    ENTROPY,
    FORWARD_KL,
    HARD,
    JSD,
    REVERSE_KL,
    SKEW_KL,
    SKEW_RKL,
    SOFT,
    TEMPERED,
    TVD,
)
from megakd_kernels.triton.row_math import LOG2_E

CE_SLOT = tl.constexpr(7)
# A sum over finite gaps is below this value; a sum with an excluded id is above.
_INFINITE = tl.constexpr(1e8)


@triton.jit
def _store_value(values, slot, row, rows, value, value_scale, rest):
    # The divergence is infinite if a row gives mass to an id that the other model excludes.
    value = tl.where(value > _INFINITE, float("inf"), value)
    # Rounding may give -1e-7 if the exact value is 0 or slightly above 0.
    value = tl.where(value < 0.0, 0.0, value) * value_scale
    # Comparisons drop a NaN; the sums of a row with a NaN keep it.
    value = tl.where(rest == rest, value, rest)  # noqa: PLR0124
    tl.store(values + slot * rows + row, value.to(tl.float32))


@triton.jit
def reach_of(summary, inverse) -> tuple[tl.tensor, ...]:
    """Return both maxima, their difference in fp32, and the remaining correction of the gap."""
    peak, peak_t, _, q_sum, p_sum, _, _, _, _, _ = summary
    difference = peak_t.to(tl.float64) - peak.to(tl.float64)
    near = difference.to(tl.float32)
    rest = ((difference - near) * inverse + tl.log(p_sum / q_sum)).to(tl.float32)
    return peak, peak_t, near, rest


@triton.jit
def store_values(
    summary, reach, mean, target, values, row, rows, inverse, value_scale, mixes, weights,
    factor, ce, PARTS: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Store the values of a row; return the factors of `_write_soft`, and of cross-entropy.

    summary: as `statistics` returns it. reach: as `reach_of` does. mean: as `means` does.
    target: the label's logit.
    """
    peak, peak_t, hard_peak, q_sum, p_sum, hard_sum, forward, reverse, _, depth = summary
    jsd_p, jsd_q, skew_p, skew_q, skew_r, skew_v, tvd_p, tvd_q = mean
    on_forward, on_reverse, on_jsd, on_skew, on_skew_reverse, on_tvd = weights
    beta, skew = mixes[0][0], mixes[1][0]
    difference = peak_t.to(tl.float64) - peak.to(tl.float64)
    offset = difference * inverse + tl.log(p_sum / q_sum)
    rest = reach[3]
    constant = 0.0
    if FORWARD_KL & PARTS:
        value = forward / p_sum * inverse - offset
        _store_value(values, 0, row, rows, value, value_scale, rest)
        constant += factor * on_forward
    if REVERSE_KL & PARTS:
        value = offset - reverse / q_sum * inverse
        _store_value(values, 1, row, rows, value, value_scale, rest)
        # An infinite value adds nothing: the gradient of the row comes only from its finite ids.
        constant -= factor * on_reverse * tl.minimum(value, 1e30).to(tl.float32)
    if JSD & PARTS:
        _store_value(values, 2, row, rows, beta * jsd_p - (1 - beta) * jsd_q, value_scale, rest)
        constant += (1 - beta) * factor * on_jsd * jsd_q.to(tl.float32)
    if SKEW_KL & PARTS:
        _store_value(values, 3, row, rows, skew_p, value_scale, rest)
        constant += (1 - skew) / skew * factor * on_skew * skew_q.to(tl.float32)
    if SKEW_RKL & PARTS:
        _store_value(values, 4, row, rows, -skew_r, value_scale, rest)
        constant += factor * on_skew_reverse * (skew_r - skew_v).to(tl.float32)
    if TVD & PARTS:
        _store_value(values, 5, row, rows, tvd_p, value_scale, rest)
        constant += 0.5 * factor * on_tvd * tvd_q.to(tl.float32)
    if ENTROPY & PARTS:
        value = tl.log(p_sum) - depth / p_sum * inverse
        _store_value(values, 6, row, rows, value, value_scale, rest)
    hard_scale = 0.0
    if HARD & PARTS:
        loss = (hard_peak.to(tl.float64) - target) + tl.log(hard_sum)
        tl.store(values + CE_SLOT * rows + row, loss.to(tl.float32))
        hard_scale = (ce / hard_sum).to(tl.float32)
        if SOFT & PARTS and not (TEMPERED & PARTS):
            # The q of cross-entropy is the q of the divergences times a factor per row.
            share = tl.exp2((peak - hard_peak) * LOG2_E) * (q_sum / hard_sum)
            constant += ce * share.to(tl.float32)
    factors = (
        (1.0 / q_sum).to(tl.float32), (factor * on_forward / p_sum).to(tl.float32),
        constant, factor * on_reverse, (1 - beta) * factor * on_jsd,
        (1 - skew) / skew * factor * on_skew, factor * on_skew_reverse, 0.5 * factor * on_tvd,
    )  # fmt: skip
    return factors, hard_scale
