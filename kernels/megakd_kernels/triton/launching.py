"""Helpers that all launches of row kernels share."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from megakd_kernels.row_plan import Warp
from megakd_kernels.triton.row_math import AS_THEY_ARE, BIASED, CAPPED, SCALED

# The blocks in flight take 32 KiB of shared memory, which leaves room for four programs of a KL
# divergence per multiprocessor of sm_90.
_STAGES = 3
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shared_memory_of(tensor: Tensor) -> int | None:
    """Return the bytes of shared memory that one program may use on the GPU of the tensor.

    None on a CPU, where Triton's interpreter runs: it needs small tiles, and it would multiply the
    bit patterns of bf16.
    """
    if not tensor.is_cuda:
        return None
    return torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin


def check_rows(**tensors: Tensor | None) -> None:
    """Raise ValueError if a kernel cannot read the rows: wrong dtype, or columns not adjacent."""
    for name, rows in tensors.items():
        if rows is None:
            continue
        if rows.dtype not in _DTYPES:
            raise ValueError(f"{name} is {rows.dtype}; Triton rows are fp32, bf16 or fp16")
        if rows.shape[1] > 1 and rows.stride(1) != 1:
            raise ValueError(f"{name} has a column stride of {rows.stride(1)}; it must be 1")


def warp_kind(warp: Warp, bias: Tensor | None) -> int:
    """Return the kind of logit transform that a kernel is compiled for."""
    kind = AS_THEY_ARE.value if bias is None else BIASED.value
    if warp.softcap != 0.0:
        return kind | CAPPED.value
    return kind if warp.scale == 1.0 else kind | SCALED.value


def bias_or(bias: Tensor | None, unused: Tensor) -> Tensor:
    """Return the bias with adjacent values; without a bias, a tensor that a kernel can take."""
    return unused if bias is None else bias.contiguous()


def stages() -> int:
    """Return how many blocks of a row are in flight at a time; 1 loads a block when it is used.

    MEGAKD_ROW_STAGES overrides the default, so that a benchmark can compare depths.
    """
    return int(os.environ.get("MEGAKD_ROW_STAGES") or _STAGES)


def registers(usual: int) -> int | None:
    """Return the most registers of a thread of a row kernel; None: as many as it likes.

    MEGAKD_ROW_REGISTERS overrides the usual number, so that a benchmark can compare; 0 means None.
    """
    return int(os.environ.get("MEGAKD_ROW_REGISTERS") or usual) or None
