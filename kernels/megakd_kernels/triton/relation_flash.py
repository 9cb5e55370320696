"""The relation loss with flash kernels, launched over blocks that can interact; no pairs saved.

Shapes: B batch, L positions, D width, A relation heads, n blocks of positions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from megakd_kernels.relation_reference import Relation
from megakd_kernels.triton import launching
from megakd_kernels.triton.relation_flash_kernels import backward_kernel, forward_kernel

_NARROWEST_DOT = 16
_INTERPRETER_BLOCK = 16
# Block and pipeline stages, best first; the first pair that fits the shared memory is used. fp32
# begins with blocks of 32: its products run in registers, which overflow with blocks of 64.
_TILINGS = ((64, 2), (64, 1), (32, 2), (32, 1), (16, 1))
_WIDE_TILINGS = _TILINGS[2:]
# Bytes per position of one head in both models, above which four warps need too many registers.
_BYTES_OF_FOUR_WARPS = 384


class _Plan(NamedTuple):
    """Launch options: positions of a block, and head widths padded for tl.dot."""

    block: int
    padded_student: int
    padded_teacher: int
    warps: int
    stages: int


def forward(relation: Relation) -> tuple[Tensor, Tensor]:
    """Return the scalar loss and the row statistics [4, B, A, L] that `backward` reads."""
    batch, length = relation.weight.shape
    statistics = relation.weight.new_empty(4, batch, relation.heads, length)
    values = relation.weight.new_empty(batch, relation.heads, length)
    if values.numel() == 0:
        return relation.weight.new_zeros(()), statistics
    keys = relation.student_queries if relation.student_keys is None else relation.student_keys
    soft = relation.teacher_queries if relation.teacher_keys is None else relation.teacher_keys
    sides = (relation.student_queries, keys, relation.teacher_queries, soft)
    _launch(forward_kernel, relation, sides, (statistics, values))
    return (values * relation.weight[:, None]).sum() / relation.heads, statistics


def backward(
    upstream: Tensor,
    statistics: Tensor,
    relation: Relation,
    *,
    wants_queries: bool,
    wants_keys: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the student's queries and keys, [B, L, Ds] in their dtype.

    A gradient that is not requested has no elements. The gradient of the queries is the whole
    gradient of a self relation.
    """
    queries, keys = relation.student_queries, relation.student_keys
    soft_queries, soft_keys = relation.teacher_queries, relation.teacher_keys
    query_gradient = queries.new_empty(queries.shape if wants_queries else 0)
    key_gradient = queries.new_empty(queries.shape if wants_keys else 0)
    scale = relation.heads * math.sqrt(queries.shape[-1] / relation.heads)
    factor = (relation.weight * (upstream / scale)).contiguous()
    if query_gradient.numel():
        sides = (queries, queries if keys is None else keys,
                 soft_queries, soft_queries if soft_keys is None else soft_keys)  # fmt: skip
        _launch(backward_kernel, relation, sides, (statistics, factor, query_gradient),
                AS_QUERIES=True, AS_KEYS=keys is None)  # fmt: skip
    if key_gradient.numel() and keys is not None and soft_keys is not None:
        _launch(backward_kernel, relation, (keys, queries, soft_keys, soft_queries),
                (statistics, factor, key_gradient),
                AS_QUERIES=False, AS_KEYS=True)  # fmt: skip
    return query_gradient, key_gradient


def _launch(
    kernel: Any,
    relation: Relation,
    sides: tuple[Tensor, Tensor, Tensor, Tensor],
    rows: tuple[Tensor, ...],
    **directions: bool,
) -> None:
    """Run one program per block, head and example; `sides`: own and streamed, student first.

    rows: kernel tensors with one value per row, statistics [4, B, A, L] first.
    """
    own_student, _, own_teacher, _ = sides
    batch, length, student_width = own_student.shape
    heads = relation.heads
    plan = _plan(own_student, own_teacher, heads)
    valid, segments = relation.valid, relation.segments
    placeholder = rows[0]
    ranges = _block_ranges(relation, plan.block)
    # A launch uses the current device, which may differ from the device of the tensors.
    with torch.cuda.device_of(own_student):
        kernel[(triton.cdiv(length, plan.block) * heads * batch,)](
            *sides,
            placeholder if valid is None else valid.contiguous().view(torch.uint8),
            placeholder if segments is None else segments.contiguous(),
            placeholder if ranges is None else ranges,
            *rows,
            *(stride for side in sides for stride in side.stride()),
            length,
            heads,
            batch * heads * length,
            _score_scale(student_width // heads),
            _score_scale(own_teacher.shape[-1] // heads),
            WIDTH_S=student_width // heads,
            WIDTH_T=own_teacher.shape[-1] // heads,
            PADDED_S=plan.padded_student,
            PADDED_T=plan.padded_teacher,
            BLOCK=plan.block,
            CAUSAL=relation.causal,
            MASKED=valid is not None,
            SEGMENTED=segments is not None,
            UPCAST=launching.shared_memory_of(own_student) is None,
            num_warps=plan.warps,
            num_stages=plan.stages,
            **directions,
        )


def _score_scale(width: int) -> float:
    return math.log2(math.e) / math.sqrt(width)


def _plan(student: Tensor, teacher: Tensor, heads: int) -> _Plan:
    padded_student, padded_teacher = (
        max(_NARROWEST_DOT, triton.next_power_of_2(side.shape[-1] // heads))
        for side in (student, teacher)
    )
    memory = launching.shared_memory_of(student)
    if memory is None:
        return _Plan(_INTERPRETER_BLOCK, padded_student, padded_teacher, warps=4, stages=1)
    sizes = student.element_size(), teacher.element_size()
    row_bytes = padded_student * sizes[0] + padded_teacher * sizes[1]
    block, stages = _tiling(row_bytes, max(sizes), memory)
    warps = 4 if row_bytes <= _BYTES_OF_FOUR_WARPS else 8
    return _Plan(block, padded_student, padded_teacher, warps, stages)


def _tiling(row_bytes: int, itemsize: int, shared_memory: int) -> tuple[int, int]:
    """Return block and stages that fit the shared memory.

    Own rows, one streamed block per stage, and a tile of scores must fit.
    """
    tilings = _WIDE_TILINGS if itemsize > 2 else _TILINGS
    for block, stages in tilings:
        if (1 + stages) * block * row_bytes + 4 * block * block <= shared_memory:
            return block, stages
    return tilings[-1]


def _block_ranges(relation: Relation, block: int) -> Tensor | None:
    """Return [B, n, 2] int32: the blocks [first, last) that each block can interact with.

    The ranges skip padding and other segments. None means all blocks. The tensor is formed on
    the device, without waiting.
    """
    valid, ids = relation.valid, relation.segments
    if valid is None and ids is None:
        return None
    valid = torch.ones_like(relation.weight, dtype=torch.bool) if valid is None else valid
    ids = torch.zeros_like(valid, dtype=torch.int32) if ids is None else ids
    padding = (0, -ids.shape[1] % block)
    valid = F.pad(valid, padding).unflatten(1, (-1, block))
    ids = F.pad(ids, padding).unflatten(1, (-1, block))
    extremes = torch.iinfo(ids.dtype)
    lowest = ids.masked_fill(~valid, extremes.max).amin(-1)  # [B, n]
    highest = ids.masked_fill(~valid, extremes.min).amax(-1)
    meets = lowest[:, :, None] <= highest[:, None, :]
    meets = meets & meets.transpose(1, 2)
    first = meets.int().argmax(-1)
    last = torch.where(meets.any(-1), meets.shape[-1] - meets.flip(-1).int().argmax(-1), 0)
    return torch.stack((first, last), dim=-1).int()
