"""Elementwise functions of the row kernels, in fp32, on blocks of one row.

Triton has no expm1, log1p or tanh of its own, and those of libdevice do not run in its
interpreter; these are as exact (about two units in the last place), and the same in both.
"""

# No `from __future__ import annotations`: Triton reads the tl.constexpr annotations as objects.
import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
MINUS_INFINITY = tl.constexpr(-math.inf)
# How raw logits become the model's; see `row_plan.Warp`.
AS_THEY_ARE = tl.constexpr(0)
SCALED = tl.constexpr(1)
CAPPED = tl.constexpr(2)

# ln 2 in two parts; the first has few enough bits that its products with exponents are exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(math.log(2.0) - 0.693359375)
_LN2 = tl.constexpr(math.log(2.0))
# Below it expm1 is -1 in fp32, above it tanh(x / 2) is 1.
_FLAT = tl.constexpr(30.0)
# Stands for log(p / 0): no sum of it over a row overflows, and 0 times it is 0.
_IMPOSSIBLE = tl.constexpr(1e32)
# The bits of 0.75: exponents are counted from there, so that a mantissa lies in [0.75, 1.5).
_BITS_OF_THREE_QUARTERS = tl.constexpr(0x3F400000)


@triton.jit
def expm1(x) -> tl.tensor:
    """exp(x) - 1 for x up to 88; the Taylor series on [-ln 2 / 2, ln 2 / 2], then scaled."""
    x = tl.where(x < -_FLAT, -_FLAT, x)
    exponent = tl.floor(x * LOG2_E + 0.5)
    r = (x - exponent * _LN2_HIGH) - exponent * _LN2_LOW
    series = r * (1 / 720 + r * (1 / 5040))
    series = r * (1 / 6 + r * (1 / 24 + r * (1 / 120) + r * series))
    series = r + r * r * (0.5 + series)
    scale = ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return scale * series + (scale - 1.0)


@triton.jit
def log1p(x) -> tl.tensor:
    """log(1 + x) for x above -1 and up to 1e37: 2 artanh(m / (2 + m)) after scaling."""
    bits = (1.0 + x).to(tl.int32, bitcast=True)
    exponent = (bits - _BITS_OF_THREE_QUARTERS) >> 23
    scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    # (1 + x) * scale - 1, in [-0.25, 0.5), without rounding 1 + x.
    m = x * scale + (scale - 1.0)
    s = m / (2.0 + m)
    square = s * s
    series = square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9))))
    return exponent.to(tl.float32) * _LN2 + 2.0 * (s + s * series)


@triton.jit
def tanh(x) -> tl.tensor:
    """The hyperbolic tangent, through expm1 so that small x keep their digits."""
    doubled = 2.0 * x
    # Not tl.minimum, which would hide a NaN.
    doubled = tl.where(doubled > _FLAT, _FLAT, doubled)
    excess = expm1(doubled)
    return excess / (excess + 2.0)


@triton.jit
def warped(raw, scale, softcap, WARP: tl.constexpr) -> tl.tensor:
    """The model's logits from raw ones, in fp32."""
    logits = raw.to(tl.float32)
    if WARP == SCALED:
        logits *= scale
    if WARP == CAPPED:
        logits = tanh(logits * (scale / softcap)) * softcap
    return logits


@triton.jit
def warp_slope(gradient, logits, scale, softcap, WARP: tl.constexpr) -> tl.tensor:
    """The gradient with respect to raw logits from that with respect to the model's."""
    if WARP == SCALED:
        gradient *= scale
    if WARP == CAPPED:
        bend = logits / softcap
        gradient *= scale * (1.0 - bend * bend)
    return gradient


@triton.jit
def gap_of(s, t, difference) -> tl.tensor:
    """The gap (t - s) - difference, without the rounding error of t - s (Knuth's two-sum).

    That error would be the gap's own where the models' logits lie far apart by a common amount.
    An excluded id is at a huge finite distance, one that both exclude at none.
    """
    raw = t - s
    back = raw - t
    error = (t - (raw - back)) - (s + back)
    gap = (raw - difference) + tl.where(error == error, error, 0.0)  # noqa: PLR0124, NaN
    gap = tl.where(gap == gap, gap, 0.0)  # noqa: PLR0124, NaN
    return tl.minimum(tl.maximum(gap, -_IMPOSSIBLE), _IMPOSSIBLE)


@triton.jit
def over_mixture(excess, skew) -> tl.tensor:
    """The excess p / m - 1 over m = skew p + (1 - skew) q, from that of p over q."""
    return (1.0 - skew) * excess / (1.0 + skew * excess)


@triton.jit
def below_mixture(excess, skew) -> tl.tensor:
    """What q lacks of m = (1 - skew) p + skew q, 1 - q / m, from the excess of p over q."""
    return (1.0 - skew) * excess / (1.0 + (1.0 - skew) * excess)


@triton.jit
def sign(x) -> tl.tensor:
    """Of x: -1, 0 or 1."""
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)
