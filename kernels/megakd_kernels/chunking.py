"""Chunks from a byte budget, matrix products with fp32 results, and formed gradients.

Shapes: C rows of a chunk, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MEBIBYTE = 1 << 20
# Measured at V = 32000: longer chunks gain 1 % of the time, shorter ones lose 10 %.
_CPU_CHUNK_BYTES = 64 * MEBIBYTE
_CPU_BLOCK_BYTES = 2 * MEBIBYTE
# Buffers of row_losses: gap, products, jsd's mix, the softmax of cross-entropy.
_SCRATCH_BUFFERS = 4
# Ids per piece when a low-precision matrix is widened for a product on the CPU.
_WIDENED_IDS = 4096


class ChunkPlan(NamedTuple):
    """Rows per chunk (matrix products) and per block (row mathematics)."""

    chunk: int
    block: int


def plan_chunks(rows: int, *, widths: tuple[int, ...], like: Tensor, chunk_mb: float) -> ChunkPlan:
    """How many rows fit the budget; `widths` are those of the chunk buffers, `like` their type.

    On a CPU chunks and blocks are kept small whatever the budget, for the caches' sake.
    """
    itemsize = like.element_size()
    budget = chunk_mb * MEBIBYTE
    bytes_per_row = itemsize * sum(widths)
    if like.device.type != "cpu":
        bytes_per_row += _SCRATCH_BUFFERS * itemsize * max(widths)
        chunk = _clamp(budget / bytes_per_row, rows)
        return ChunkPlan(chunk, chunk)
    chunk = _clamp(min(budget, _CPU_CHUNK_BYTES) / bytes_per_row, rows)
    return ChunkPlan(chunk, _clamp(_CPU_BLOCK_BYTES / (itemsize * max(widths)), chunk))


def slices(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover `length`."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def masked_rows(hidden: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows with zeros where not valid, so that what stood there cannot matter; [C, H]."""
    kept = hidden.masked_fill(~valid[:, None], 0)
    return kept if _multiplies_narrow(kept, dtype) else kept.to(dtype)


def project_into(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Writes hidden [C, H] @ weight [V, H].T + bias [V] to out [C, V], in out's dtype."""
    if weight.dtype == hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif _is_native(hidden, weight, out):
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        for ids in slices(len(weight), _WIDENED_IDS):
            torch.mm(hidden, weight[ids].to(out.dtype).T, out=out[:, ids])
    return out if bias is None else out.add_(bias)


def input_gradient_into(out: Tensor, gradient: Tensor, weight: Tensor) -> None:
    """Writes gradient [C, V] @ weight [V, H] to out [C, H], in out's dtype."""
    if weight.dtype == gradient.dtype == out.dtype:
        torch.mm(gradient, weight, out=out)
    elif _is_native(gradient, weight, out):
        torch.mm(gradient, weight, out_dtype=out.dtype, out=out)
    else:
        out.zero_()
        for ids in slices(len(weight), _WIDENED_IDS):
            out.addmm_(gradient[:, ids].to(out.dtype), weight[ids].to(out.dtype))


def add_weight_gradient_(out: Tensor, gradient: Tensor, hidden: Tensor, *, beta: float) -> None:
    """Makes out [V, H] beta * out + gradient [C, V].T @ hidden [C, H], in out's dtype."""
    if _is_native(gradient, hidden, out):
        product = torch.mm(gradient.T, hidden, out_dtype=out.dtype)
        _ = out.copy_(product) if beta == 0 else out.mul_(beta).add_(product)
    else:
        out.addmm_(gradient.to(out.dtype).T, hidden.to(out.dtype), beta=beta)


def narrow_gradient(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient in the type its products run in: that of `like` if the device has such."""
    return gradient.to(like.dtype) if _multiplies_narrow(like, gradient.dtype) else gradient


def attach_gradients(
    loss: Tensor, scale: Tensor, inputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]
) -> Tensor:
    """`loss` as a function of `inputs` whose gradients are scale * gradients, formed already.

    The gradients stay as they are: scale and upstream gradient multiply them in their own
    precision, in the backward, before the cast to the input's type. A second backward over a
    retained graph gives the same again. Inputs without a formed gradient are constants.
    """
    if not any(gradient is not None for gradient in gradients):
        return loss
    return _Formed.apply(loss, scale, gradients, *inputs)  # pyright: ignore[reportReturnType]


class _Formed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        scale: Tensor,
        gradients: tuple[Tensor | None, ...],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(scale, *gradients)
        ctx.dtypes = tuple(tensor.dtype for tensor in inputs)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: once_differentiable's type
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        scale, *gradients = ctx.saved_tensors
        factor = upstream * scale
        scaled = (
            None if gradient is None else _scaled(gradient, factor, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (None, None, None, *scaled)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


def _multiplies_narrow(tensor: Tensor, result: torch.dtype) -> bool:
    """Whether the device multiplies this type with fp32 results.

    fp16 is left out: gradients times 1e-6 token weights would vanish in it.
    """
    return (
        tensor.is_cuda
        and tensor.dtype == torch.bfloat16
        and result == torch.float32
        and hasattr(torch.ops.aten.mm, "dtype_out")
    )


def _is_native(left: Tensor, right: Tensor, out: Tensor) -> bool:
    return left.dtype == right.dtype and _multiplies_narrow(left, out.dtype)


def _clamp(rows: float, most: int) -> int:
    return int(max(1, min(rows, most)))
