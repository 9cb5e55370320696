"""Elementwise functions of the row kernels, in fp32, on blocks of one row.

Triton has no expm1 or tanh, and the libdevice versions do not run in its interpreter. The
functions here are equally exact (about two units in the last place) and work in both.
"""

# No `from __future__ import annotations`: Triton reads the tl.constexpr annotations as objects.
# Triton's type annotations describe Python calls, not compiled kernels.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
import math
import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
MINUS_INFINITY = tl.constexpr(-math.inf)
# Kinds of logit transforms, see `row_plan.Warp`, as bits of WARP.
AS_THEY_ARE = tl.constexpr(0)
SCALED = tl.constexpr(1)
CAPPED = tl.constexpr(2)
# With a bias per id, which is added before the transform.
BIASED = tl.constexpr(4)

# ln 2 in two parts; the first has few enough bits that its products with exponents are exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(math.log(2.0) - 0.693359375)
_LN2 = tl.constexpr(math.log(2.0))
# Below -30 expm1 is -1 in fp32; above 30 tanh(x / 2) is 1.
_FLAT = tl.constexpr(30.0)
# Represents an excluded logit and log(p / 0): its sum over a row does not overflow, and its product
# with 0 is 0.
_IMPOSSIBLE = tl.constexpr(1e32)
# Gaps below this value use the series of `log_mixture`, whose relative error is then below 3e-7.
_NEAR = tl.constexpr(0.4)
# Triton decides when it defines a kernel whether the kernel is compiled.
_IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_TERMS = 8


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
    if SCALED & WARP:
        logits *= scale
    if CAPPED & WARP:
        logits = tanh(logits * (scale / softcap)) * softcap
    return logits


@triton.jit
def warp_slope(gradient, logits, scale, softcap, WARP: tl.constexpr) -> tl.tensor:
    """Convert the gradient of the model's logits to the gradient of the raw logits."""
    if SCALED & WARP:
        gradient *= scale
    if CAPPED & WARP:
        bend = logits / softcap
        gradient *= scale * (1.0 - bend * bend)
    return gradient


@triton.jit
def gap_of(s, t, difference) -> tl.tensor:
    """Return the gap (t - s) - difference without the rounding error of t - s (Knuth's two-sum).

    The rounding error would be as large as the gap if the logits of the models differ by a large
    common amount. The gap of an excluded id is huge and finite; the gap of an id that both models
    exclude is -difference, and its probabilities are 0. A NaN may be lost here: the sums of the
    row keep it.
    """
    s, t = tl.maximum(s, -_IMPOSSIBLE), tl.maximum(t, -_IMPOSSIBLE)
    raw = t - s
    back = raw - t
    error = (t - (raw - back)) - (s + back)
    return (raw - difference) + error


@triton.jit
def _log2(x) -> tl.tensor:
    """Return log2(x) of a normal number above 0, with an absolute error below 3e-7 near 1."""
    if _IS_INTERPRETED:
        return tl.log2(x)
    # Triton's log2 takes 24 instructions, because it is exact to the last place.
    code: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(code, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x) -> tl.tensor:
    """Return 1 / x of a normal number, up to one unit in the last place."""
    if _IS_INTERPRETED:
        return 1.0 / x
    # Triton's division also handles denormal numbers, in eight instructions.
    code: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(code, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log_mixture(gap, mix) -> tuple[tl.tensor, tl.tensor]:
    """Return log(m / q), and the tilt a (p / m - 1), of m = a p + (1 - a) q; gap = log(p / q).

    log(m / q) = log(1 + a (exp(gap) - 1)) is the cumulant generating function of a coin, and
    a p / m is its derivative. Small gaps use its Taylor series, so that close p and q keep their
    digits.

    gap: in [-80, 80]. mix: a, then the coefficients of gap^2 to gap^8 (`mixture_series`).
    """
    share = mix[0]
    # Horner's scheme for the series from gap^2 on, divided by gap^2, and for its derivative.
    series, bend = mix[7], tl.zeros_like(gap)
    for power in tl.static_range(6, 0, -1):  # pyright: ignore[reportGeneralTypeIssues]
        bend = bend * gap + series
        series = series * gap + mix[power]
    is_near = tl.abs(gap) < _NEAR
    ratio = tl.exp2(gap * LOG2_E)
    mixed = (1.0 - share) + share * ratio
    log = tl.where(is_near, gap * (share + gap * series), _log2(mixed) * _LN2)
    far = share * (1.0 - share) * (ratio - 1.0) * _reciprocal(mixed)
    tilt = tl.where(is_near, gap * (2.0 * series + gap * bend), far)
    return log, tilt


@triton.jit
def sign(x) -> tl.tensor:
    """Return the sign of x: -1, 0 or 1."""
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


def mixture_series(share: float) -> tuple[float, ...]:
    """Return `share` and the coefficients of x^2 to x^8 in log(1 + share (exp(x) - 1)).

    The derivative of this function satisfies u' = u - u^2.
    """
    slopes = [share]
    for power in range(_TERMS - 1):
        squares = sum(slopes[i] * slopes[power - i] for i in range(power + 1))
        slopes.append((slopes[power] - squares) / (power + 1))
    return (share, *(slope / (power + 1) for power, slope in enumerate(slopes) if power))
