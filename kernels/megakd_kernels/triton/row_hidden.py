"""Losses between rows of projected student states and teacher states, with their gradients.

One program per row. Each state is read once; the gradient of the cosine reads rows wider than 8192
twice.
Shapes: C rows of a chunk, Ht width.
"""

# No `from __future__ import annotations`: Triton reads the tl.constexpr annotations as objects.
# Triton's type annotations describe Python calls, not compiled kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd_kernels.triton.launching import check_rows
from megakd_kernels.triton.row_kd_sweeps import write_zeros

# Widest block of a program, whose registers hold two blocks of half this width.
_WIDEST_BLOCK = 8192
# Vectors with a smaller square have cosine 0; this is the square of hidden_ops.SMALLEST_NORM.
_SMALLEST_SQUARE = tl.constexpr(1e-24)


def squared_error_rows(
    projected: Tensor, target: Tensor, valid: Tensor, gradient: Tensor | None
) -> Tensor:
    """Return the mean over the width of (z - y)^2; form its gradient 2 (z - y) / Ht.

    Args:
        projected: z [C, Ht] fp32, bf16 or fp16, any row stride.
        target: y [C, Ht] in one of these dtypes.
        valid: [C] bool; other rows have the value 0 and a gradient of zeros, and are not read.
        gradient: output [C, Ht] in one of these dtypes, possibly `projected` itself; None: no
            gradient is requested.

    Returns:
        [C] fp32.

    Raises:
        ValueError: another dtype, or columns that are not adjacent.
    """
    return _run(_squared_error_kernel, projected, target, valid, gradient)


def one_minus_cosine_rows(
    projected: Tensor, target: Tensor, valid: Tensor, gradient: Tensor | None
) -> Tensor:
    """Return 1 - z . y / (|z| |y|); form its gradient (cosine z / |z| - y / |y|) / |z|.

    A vector shorter than 1e-12 has the value 1 and no gradient. For arguments, result and errors
    see `squared_error_rows`.
    """
    return _run(_cosine_kernel, projected, target, valid, gradient)


@triton.jit
def _load(row, ids, width, POLICY: tl.constexpr):
    return tl.load(row + ids, mask=ids < width, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def _store(row, ids, width, values):
    tl.store(row + ids, values.to(row.dtype.element_ty), mask=ids < width)


@triton.jit
def _squared_error_kernel(
    projected, target, gradient, valid, values,
    width, stride_z, stride_y, stride_g,
    BLOCK: tl.constexpr, IS_ONE_BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # the product with a stride may exceed int32
    gradient += row * stride_g
    if tl.load(valid + row) == 0:
        if WITH_GRADIENT:
            write_zeros(gradient, width, BLOCK)
        return
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = _load(projected + row * stride_z, ids, width, "evict_first")
        y = _load(target + row * stride_y, ids, width, "evict_first")
        residual = z - y
        total += residual * residual
        if WITH_GRADIENT:
            _store(gradient, ids, width, residual * (2.0 / width))
    tl.store(values + row, tl.sum(total, 0) / width)


@triton.jit
def _inverse_norm(square):
    is_long = square > _SMALLEST_SQUARE
    return tl.where(is_long, tl.rsqrt(tl.where(is_long, square, 1.0)), 0.0)


@triton.jit
def _cosine_kernel(
    projected, target, gradient, valid, values,
    width, stride_z, stride_y, stride_g,
    BLOCK: tl.constexpr, IS_ONE_BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # the product with a stride may exceed int32
    gradient += row * stride_g
    if tl.load(valid + row) == 0:
        if WITH_GRADIENT:
            write_zeros(gradient, width, BLOCK)
        return
    projected += row * stride_z
    target += row * stride_y
    ids = tl.arange(0, BLOCK)
    if IS_ONE_BLOCK:
        z = _load(projected, ids, width, "evict_first")
        y = _load(target, ids, width, "evict_first")
        scale_z, scale_y = _inverse_norm(tl.sum(z * z, 0)), _inverse_norm(tl.sum(y * y, 0))
        z, y = z * scale_z, y * scale_y
        cosine = tl.sum(z * y, 0)
        if WITH_GRADIENT:
            _store(gradient, ids, width, (cosine * z - y) * scale_z)
    else:
        square_z = tl.zeros([BLOCK], tl.float32)
        square_y = tl.zeros([BLOCK], tl.float32)
        product = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            z = _load(projected, start + ids, width, "")
            y = _load(target, start + ids, width, "")
            square_z += z * z
            square_y += y * y
            product += z * y
        scale_z, scale_y = _inverse_norm(tl.sum(square_z, 0)), _inverse_norm(tl.sum(square_y, 0))
        cosine = tl.sum(product, 0) * scale_z * scale_y
        if WITH_GRADIENT:
            for start in range(0, width, BLOCK):
                z = _load(projected, start + ids, width, "evict_first") * scale_z
                y = _load(target, start + ids, width, "evict_first") * scale_y
                _store(gradient, start + ids, width, (cosine * z - y) * scale_z)
    tl.store(values + row, 1.0 - cosine)


def _run(
    kernel: triton.JITFunction,
    projected: Tensor,
    target: Tensor,
    valid: Tensor,
    gradient: Tensor | None,
) -> Tensor:
    out = projected if gradient is None else gradient
    check_rows(projected=projected, target=target, gradient=out)
    count, width = projected.shape
    # Rows that are not valid stay zero.
    values = projected.new_zeros(count, dtype=torch.float32)
    if values.numel() == 0 or width == 0:
        return values
    block = min(triton.next_power_of_2(width), _WIDEST_BLOCK)
    with torch.cuda.device_of(projected):
        kernel[(count,)](
            projected, target, out, valid.contiguous(), values,
            width, projected.stride(0), target.stride(0), out.stride(0),
            BLOCK=block, IS_ONE_BLOCK=width <= block, WITH_GRADIENT=gradient is not None,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return values
