"""Helpers that all launches of row kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from megakd_kernels.row_plan import Warp
from megakd_kernels.triton.row_math import AS_THEY_ARE, CAPPED, SCALED

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_rows(**tensors: Tensor | None) -> None:
    """Raise ValueError if a kernel cannot read the rows: wrong dtype, or columns not adjacent."""
    for name, rows in tensors.items():
        if rows is None:
            continue
        if rows.dtype not in _DTYPES:
            raise ValueError(f"{name} is {rows.dtype}; Triton rows are fp32, bf16 or fp16")
        if rows.shape[1] > 1 and rows.stride(1) != 1:
            raise ValueError(f"{name} has a column stride of {rows.stride(1)}; it must be 1")


def warp_kind(warp: Warp) -> int:
    """Return the kind of logit transform that a kernel is compiled for."""
    if warp.softcap != 0.0:
        return CAPPED.value
    return AS_THEY_ARE.value if warp.scale == 1.0 else SCALED.value
