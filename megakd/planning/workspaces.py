"""Internal memory of the fused losses: chunk buffers, which a model's forward does not show."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megakd_kernels.chunking import (
    CPU_CHUNK_MB,
    chunk_budget,
    gradient_dtype,
    plan_chunks,
    plan_row_chunks,
)

_FP32 = torch.float32
_LIKE = {device: torch.empty(0, device=to) for device, to in (("cpu", "cpu"), ("cuda", "meta"))}
_ROW_BUFFERS = 5
"""Block buffers of the row kernels on a CPU; a GPU has none."""
_LINEAR_CHUNK_MB = 20
"""Position of the chunk size in the arguments of `megakd::linear_kd`; 0: the default."""
_RELATION_TILE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


def loss_workspace(
    function: Any, args: tuple[Any, ...], device: str, memory: int | None = None
) -> int:
    """Return the bytes that an operator of `megakd_kernels` holds in addition to its results.

    The result is 0 for other operators.

    Args:
        function: the operator, as torch's dispatcher names it.
        args: arguments of the call.
        device: cpu or cuda, which determines the chunk size.
        memory: bytes of a GPU, which determine the chunk size too; None: not known.
    """
    known = _WORKSPACES.get(_name(function))
    budget = CPU_CHUNK_MB if device == "cpu" else chunk_budget(memory)
    return 0 if known is None else known(args, device, budget)


def loss_flops(function: Any, args: tuple[Any, ...]) -> float:
    """Return the floating-point operations of the matrix products of such an operator."""
    if _name(function) not in {"megakd::linear_kd", "megakd::linear_stats"}:
        return 0.0
    rows, width = args[0].shape
    student = 2.0 * rows * len(args[1]) * width
    forms_gradients = _name(function) == "megakd::linear_kd" and any(args[10])
    teacher = 2.0 * rows * args[4].numel() if isinstance(args[4], Tensor) else 0.0
    return student * (3 if forms_gradients else 1) + teacher


def _name(function: Any) -> str:
    return getattr(function, "name", str)().partition(".")[0]


def _linear(args: tuple[Any, ...], device: str, budget: float) -> int:
    """Return the bytes of a chunk: logits of both models, hidden states, and gradients."""
    hidden, heads = args[0], [head for head in (args[1], args[4]) if head is not None]
    widths = tuple(map(len, heads))
    narrow = _FP32 if device == "cpu" else gradient_dtype(hidden, _FP32)
    plan = plan_row_chunks(
        len(hidden),
        widths=widths,
        like=_LIKE[device],
        gradient=narrow,
        chunk_mb=args[_LINEAR_CHUNK_MB] or budget,
        implementation="chunked" if device == "cpu" else "triton",
    )
    group = min(plan.group, len(hidden))
    # The hidden states are in fp32, with zeros in masked rows.
    buffers = plan.chunk * sum(widths) * 4 + group * hidden.shape[1] * 4
    if device == "cpu":
        return buffers + _ROW_BUFFERS * plan.block * max(widths) * 4
    return buffers + (group * widths[0] * narrow.itemsize if narrow != _FP32 else 0)


def _stats(args: tuple[Any, ...], device: str, budget: float) -> int:
    rows, width = len(args[0]), len(args[1])
    if device != "cpu":
        return 0
    plan = plan_chunks(rows, widths=(width,), like=_LIKE[device], chunk_mb=budget)
    return (plan.chunk + _ROW_BUFFERS * plan.block) * width * 4


def _hidden(args: tuple[Any, ...], device: str, _: float) -> int:
    student, teacher = args[0], args[2]
    widths = (student.shape[1], teacher.shape[1], teacher.shape[1])
    plan = plan_chunks(len(student), widths=widths, like=_LIKE[device], chunk_mb=64)
    return plan.chunk * sum(widths) * 4


def _relation(args: tuple[Any, ...], device: str, _: float) -> int:
    """Return the bytes of three tiles (rows, keys, all relation heads) and of one example."""
    student, teacher = args[0], args[2]
    example = math.prod(student.shape[1:]) + math.prod(teacher.shape[1:])
    return 3 * _RELATION_TILE_BYTES[device] + 8 * example


_WORKSPACES = {
    "megakd::linear_kd": _linear,
    "megakd::linear_stats": _stats,
    "megakd::hidden_loss": _hidden,
    "megakd::relation_kl": _relation,
}
