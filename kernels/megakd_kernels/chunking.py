"""Chunks from a byte budget, matrix products with fp32 results, and formed gradients.

Shapes: C rows of a chunk, V vocabulary, H width.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MEBIBYTE = 1 << 20
# Budget of the chunk buffers if the caller names none, in MiB.
GPU_CHUNK_MB = 1024.0
# Measured at V = 32000: chunks of 128 MiB save 2 % of the time, chunks of 48 MiB cost 3 %.
CPU_CHUNK_MB = 64.0
# A block and its buffers fit the caches; larger chunks take blocks of twice the size.
_CPU_BLOCK_MB, _MOST_CPU_BLOCK_MB = 1.0, 2.0
# Buffers that row_losses needs in addition to the logits: gap, products, mix, slopes, and the
# softmax of cross-entropy.
_SCRATCH_BUFFERS = 5
# On an accelerator the row stride of a logits buffer is a multiple of this many columns, so that
# every row starts at a multiple of 16 bytes.
_ALIGNMENT = 64
# Ids per piece if the device has no matrix product with a result of another dtype.
_PIECE_IDS = 4096
_NARROW = (torch.bfloat16, torch.float16)


class ChunkPlan(NamedTuple):
    """Numbers of rows that are processed together.

    group: rows per matrix product of the gradient.
    chunk: rows per matrix product of the logits, at most those of a group.
    block: rows per call of the row mathematics.
    """

    group: int
    chunk: int
    block: int


def plan_row_chunks(
    rows: int,
    *,
    widths: tuple[int, ...],
    like: Tensor,
    gradient: torch.dtype,
    chunk_mb: float,
    implementation: str,
) -> ChunkPlan:
    """Return the chunk sizes of a loss on logits; `gradient` is the dtype of its products.

    `chunk_mb` is the budget that a caller names, or 0 for the default of the device.
    """
    chunk_mb = chunk_mb or (CPU_CHUNK_MB if like.device.type == "cpu" else GPU_CHUNK_MB)
    if implementation == "triton" and not like.is_cpu:
        return plan_fused_chunks(
            rows, widths=widths, like=like, gradient=gradient, chunk_mb=chunk_mb
        )
    plan = plan_chunks(rows, widths=widths, like=like, chunk_mb=chunk_mb)
    # One launch processes all rows of a chunk.
    return plan._replace(block=plan.chunk) if implementation == "triton" else plan


def plan_chunks(rows: int, *, widths: tuple[int, ...], like: Tensor, chunk_mb: float) -> ChunkPlan:
    """Return the numbers of rows that fit the budget.

    `widths` are the widths of the chunk buffers, and `like` gives their dtype. On a CPU, blocks
    stay small whatever the budget, so that they fit the caches.
    """
    itemsize = like.element_size()
    budget = chunk_mb * MEBIBYTE
    bytes_per_row = itemsize * max(sum(widths), 1)
    if like.device.type != "cpu":
        bytes_per_row += _SCRATCH_BUFFERS * itemsize * max(widths)
        chunk = _clamp(budget / bytes_per_row, rows)
        return ChunkPlan(chunk, chunk, chunk)
    chunk = _balanced(_clamp(budget / bytes_per_row, rows), rows)
    blocks_mb = min(max(_CPU_BLOCK_MB, chunk_mb / CPU_CHUNK_MB), _MOST_CPU_BLOCK_MB)
    block = _clamp(blocks_mb * MEBIBYTE / (itemsize * max(*widths, 1)), chunk)
    return ChunkPlan(chunk, chunk, block)


def plan_fused_chunks(
    rows: int, *, widths: tuple[int, ...], like: Tensor, gradient: torch.dtype, chunk_mb: float
) -> ChunkPlan:
    """Return the chunk sizes for row kernels that need no scratch memory, on an accelerator.

    A gradient in a narrower dtype than the logits has its own buffer, which takes half of the
    budget: products of the gradient gain more from additional rows than products of the logits.
    Otherwise the gradient is written over the student's logits.
    """
    itemsize = like.element_size()
    padded = [_aligned(width) for width in widths]
    budget = chunk_mb * MEBIBYTE
    if gradient == like.dtype:
        chunk = _alike(budget / (itemsize * sum(padded)), rows)
        return ChunkPlan(chunk, chunk, chunk)
    group = _alike(budget / 2 / (gradient.itemsize * padded[0]), rows)
    chunk = _alike(budget / 2 / (itemsize * sum(padded)), group)
    return ChunkPlan(group, chunk, chunk)


def logits_buffer(rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised [rows, width] buffer with aligned rows on an accelerator."""
    stride = width if like.device.type == "cpu" else _aligned(width)
    return like.new_empty(rows, stride, dtype=dtype)[:, :width]


def logits_buffers(rows: int, widths: Sequence[int], like: Tensor) -> list[Tensor]:
    """Return one buffer [rows, width] per width, like `logits_buffer`.

    On a CPU the buffers are one allocation: the C library keeps freed blocks of up to 32 MiB, and
    the memory would then stay in use.
    """
    if like.device.type != "cpu":
        return [logits_buffer(rows, width, like) for width in widths]
    parts = like.new_empty(rows * sum(widths)).split([rows * width for width in widths])
    return [part.view(rows, width) for part, width in zip(parts, widths, strict=True)]


def slices(length: int, step: int) -> Iterator[slice]:
    """Return consecutive slices of at most `step` elements that cover `length` elements."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def masked_rows(hidden: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows [C, H] with zeros where not valid, so that invalid rows have no effect."""
    kept = hidden.masked_fill(~valid[:, None], 0)
    return kept if _projects_narrow(kept, dtype) else kept.to(dtype)


def project_into(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Write hidden [C, H] @ weight [V, H].T + bias [V] to out [C, V], in out's dtype."""
    if weight.dtype == hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif weight.dtype == hidden.dtype and _projects_narrow(hidden, out.dtype):
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        for ids in slices(len(weight), _PIECE_IDS):
            torch.mm(hidden, weight[ids].to(out.dtype).T, out=out[:, ids])
    return out if bias is None else out.add_(bias)


def input_gradient_into(out: Tensor, gradient: Tensor, weight: Tensor) -> None:
    """Write gradient [C, V] @ weight [V, H] to out [C, H], in out's dtype."""
    if weight.dtype == gradient.dtype == out.dtype:
        torch.mm(gradient, weight, out=out)
    elif _is_native(gradient, weight, out):
        torch.mm(gradient, weight, out_dtype=out.dtype, out=out)
    else:
        out.zero_()
        for ids in slices(len(weight), _PIECE_IDS):
            out.addmm_(gradient[:, ids].to(out.dtype), weight[ids].to(out.dtype))


def add_weight_gradient_(
    out: Tensor, gradient: Tensor, hidden: Tensor, *, is_first: bool = False
) -> None:
    """Add gradient [C, V].T @ hidden [C, H] to out [V, H], in out's dtype.

    is_first: `out` holds nothing yet, and is set.
    """
    if not _is_native(gradient, hidden, out):
        beta = 0.0 if is_first else 1.0
        out.addmm_(gradient.to(out.dtype).T, hidden.to(out.dtype), beta=beta)
    elif is_first:
        torch.mm(gradient.T, hidden, out_dtype=out.dtype, out=out)
    elif _accumulates_narrow(out.device):
        torch.addmm(out, gradient.T, hidden, out_dtype=out.dtype, out=out)
    else:
        for ids in slices(len(out), _PIECE_IDS):
            out[ids] += torch.mm(gradient[:, ids].T, hidden, out_dtype=out.dtype)


def gradient_dtype(hidden: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for products with a gradient: hidden's if the device supports it."""
    return hidden.dtype if _multiplies_narrow(hidden, dtype) else dtype


def _multiplies_narrow(tensor: Tensor, result: torch.dtype) -> bool:
    """Return whether gradients are multiplied in the dtype of this tensor, with fp32 results.

    fp16 is excluded: gradients multiplied by token weights of 1e-6 would underflow to 0.
    """
    return tensor.dtype == torch.bfloat16 and _projects_narrow(tensor, result)


def _projects_narrow(tensor: Tensor, result: torch.dtype) -> bool:
    """Return whether the device multiplies tensors of this dtype with fp32 results."""
    is_candidate = tensor.is_cuda and tensor.dtype in _NARROW and result == torch.float32
    return is_candidate and _has_wide_results(tensor.device, tensor.dtype)


def _is_native(left: Tensor, right: Tensor, out: Tensor) -> bool:
    return left.dtype == right.dtype and _multiplies_narrow(left, out.dtype)


@functools.cache
def _has_wide_results(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of a 16-bit dtype with fp32 results work."""
    return _works(
        device,
        dtype,
        lambda narrow, out: torch.mm(narrow, narrow, out_dtype=torch.float32, out=out),
    )


@functools.cache
def _accumulates_narrow(device: torch.device) -> bool:
    """Return whether a product adds to an fp32 matrix without a second matrix."""
    return _works(
        device,
        torch.bfloat16,
        lambda narrow, out: torch.addmm(out, narrow, narrow, out_dtype=torch.float32, out=out),
    )


def _works(
    device: torch.device, dtype: torch.dtype, product: Callable[[Tensor, Tensor], object]
) -> bool:
    """Try a product once per device and dtype, because torch versions and GPUs differ."""
    narrow = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        product(narrow, out)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        # Memory that is short, for the handle of cuBLAS as well, says nothing about the product.
        if isinstance(error, torch.OutOfMemoryError) or "cublasCreate" in str(error):
            raise
        warnings.warn(
            f"{device} or this torch has no product of {dtype} matrices with an fp32 result, so "
            f"the losses multiply in fp32, several times slower: {error}",
            stacklevel=2,
        )
        return False
    return True


def _aligned(width: int) -> int:
    return -(-width // _ALIGNMENT) * _ALIGNMENT


def _alike(most: float, rows: int) -> int:
    """Return the rows of as few parts as possible, alike up to the 64 rows of a product's tile.

    A short last part would leave multiprocessors without a tile, and would read and write the
    gradient of the weight for a few rows.
    """
    whole_tiles = most if most < _ALIGNMENT else most // _ALIGNMENT * _ALIGNMENT
    chunk = _clamp(whole_tiles, rows)
    share = _balanced(chunk, rows)
    return share if chunk < _ALIGNMENT else min(chunk, _aligned(share))


def _balanced(chunk: int, rows: int) -> int:
    """Return the rows of as many chunks of equal size: a short last chunk would be slow."""
    return -(-rows // -(-rows // chunk)) if rows else chunk


def _clamp(rows: float, most: int) -> int:
    return int(max(1, min(rows, most)))
