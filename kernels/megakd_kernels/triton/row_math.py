"""Elementwise functions of the row kernels, in fp32, on blocks of one row.

Triton has no expm1, log1p or tanh, and the libdevice versions do not run in its interpreter. The
functions here are equally exact (about two units in the last place) and work in both.
"""

# No `from __future__ import annotations`: Triton reads the tl.constexpr annotations as objects.
import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
MINUS_INFINITY = tl.constexpr(-math.inf)
# Kinds of logit transforms; see `row_plan.Warp`.
AS_THEY_ARE = tl.constexpr(0)
SCALED = tl.constexpr(1)
CAPPED = tl.constexpr(2)

# ln 2 in two parts; the first has few enough bits that its products with exponents are exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(math.log(2.0) - 0.693359375)
_LN2 = tl.constexpr(math.log(2.0))
# Below -30 expm1 is -1 in fp32; above 30 tanh(x / 2) is 1.
_FLAT = tl.constexpr(30.0)
# Represents log(p / 0): its sum over a row does not overflow, and its product with 0 is 0.
_IMPOSSIBLE = tl.constexpr(1e32)
# The bits of 0.75: exponents are relative to 0.75, so that a mantissa is in [0.75, 1.5).
_BITS_OF_THREE_QUARTERS = tl.constexpr(0x3F400000)


@triton.jit
def expm1(x) -> tl.tensor:
    """Return exp(x) - 1 for x up to 88: a Taylor series on [-ln 2 / 2, ln 2 / 2], then scaled."""
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
    """Return log(1 + x) for x above -1 and up to 1e37: 2 artanh(m / (2 + m)) after scaling."""
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
    """Return the hyperbolic tangent, computed with expm1 so that small x keep their digits."""
    doubled = 2.0 * x
    # Not tl.minimum, which would hide a NaN.
    doubled = tl.where(doubled > _FLAT, _FLAT, doubled)
    excess = expm1(doubled)
    return excess / (excess + 2.0)


@triton.jit
def warped(raw, scale, softcap, WARP: tl.constexpr) -> tl.tensor:
    """Return the logits of the model from raw logits, in fp32."""
    logits = raw.to(tl.float32)
    if WARP == SCALED:
        logits *= scale
    if WARP == CAPPED:
        logits = tanh(logits * (scale / softcap)) * softcap
    return logits


@triton.jit
def warp_slope(gradient, logits, scale, softcap, WARP: tl.constexpr) -> tl.tensor:
    """Convert the gradient of the model's logits to the gradient of the raw logits."""
    if WARP == SCALED:
        gradient *= scale
    if WARP == CAPPED:
        bend = logits / softcap
        gradient *= scale * (1.0 - bend * bend)
    return gradient


@triton.jit
def gap_of(s, t, difference) -> tl.tensor:
    """Return the gap (t - s) - difference without the rounding error of t - s (Knuth's two-sum).

    The rounding error would be as large as the gap if the logits of the models differ by a large
    common amount. The gap of an excluded id is huge and finite; it is 0 if both models exclude
    the id.
    """
    raw = t - s
    back = raw - t
    error = (t - (raw - back)) - (s + back)
    gap = (raw - difference) + tl.where(error == error, error, 0.0)  # noqa: PLR0124, NaN
    gap = tl.where(gap == gap, gap, 0.0)  # noqa: PLR0124, NaN
    return tl.minimum(tl.maximum(gap, -_IMPOSSIBLE), _IMPOSSIBLE)


@triton.jit
def over_mixture(excess, skew) -> tl.tensor:
    """Return p / m - 1 with m = skew p + (1 - skew) q, from excess = p / q - 1."""
    return (1.0 - skew) * excess / (1.0 + skew * excess)


@triton.jit
def below_mixture(excess, skew) -> tl.tensor:
    """Return 1 - q / m with m = (1 - skew) p + skew q, from excess = p / q - 1."""
    return (1.0 - skew) * excess / (1.0 + (1.0 - skew) * excess)


@triton.jit
def sign(x) -> tl.tensor:
    """Return the sign of x: -1, 0 or 1."""
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)
