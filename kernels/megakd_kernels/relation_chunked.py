"""The relation loss in tiles of query rows, in plain torch; [B, A, L, L] never exists.

A tile holds whole rows of both relations, so that one sweep with three buffers forms the loss
and the gradient.
Shapes: B batch, L positions, D width, A relation heads, d = D / A, R rows of a tile, K keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.chunking import MEBIBYTE, slices
from megakd_kernels.inputs import compute_dtype
from megakd_kernels.relation_reference import Relation, split_heads

# Bytes of one buffer. Buffers on a CPU are small so that they fit the caches.
_CPU_TILE_BYTES = 2 * MEBIBYTE
_DEVICE_TILE_BYTES = 64 * MEBIBYTE
# Finite, so that the difference of two hidden scores is 0. A row with only hidden scores is
# uniform for both models and has no loss and no gradient.
_HIDDEN_SCORE = -1e30


class _Model(NamedTuple):
    """One example of one model, [A, L, d]; both fields of a self relation are the same tensor."""

    queries: Tensor
    keys: Tensor


class _Gradients(NamedTuple):
    """Sums over the tiles of one example, [A, L, d] or None; one tensor for a self relation."""

    queries: Tensor | None
    keys: Tensor | None


class _Tile(NamedTuple):
    """Rows of one example that are processed together, and the keys [0, K) that they can see.

    hidden: [R, K] or [1, K] bool, pairs that do not see each other; None: all pairs do.
    weight: [R], divided by the number of heads.
    buffers: [3, A, R, K] scratch memory.
    """

    rows: slice
    keys: slice
    hidden: Tensor | None
    weight: Tensor
    buffers: Tensor


def relation_sweep(
    relation: Relation, *, wants_queries: bool, wants_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss and its gradients for the student's queries and keys.

    Returns:
        Scalar loss and gradients [B, L, Ds], [B, L, Ds], in the compute dtype; a gradient that is
        not requested has no elements. The gradient of the queries is the whole gradient of a
        self relation.
    """
    dtype = compute_dtype(relation.student_queries, relation.teacher_queries)
    total = relation.weight.new_zeros((), dtype=dtype)
    shape = relation.student_queries.shape
    query_gradient = total.new_empty(shape if wants_queries else 0)
    key_gradient = total.new_empty(shape if wants_keys else 0)
    step = _rows_per_tile(relation, total)
    scratch = total.new_empty(3, step * relation.heads * shape[1])
    for example in range(shape[0]):
        student = _model(relation.student_queries, relation.student_keys, relation, example, dtype)
        teacher = _model(relation.teacher_queries, relation.teacher_keys, relation, example, dtype)
        sums = _zero_sums(student, wants_queries=wants_queries, wants_keys=wants_keys)
        for rows in slices(shape[1], step):
            tile = _tile(relation, example, rows, scratch)
            total += _add_tile(tile, student, teacher, sums)
        _store(query_gradient, sums.queries, example)
        _store(key_gradient, sums.keys, example)
    return total, query_gradient, key_gradient


def _rows_per_tile(relation: Relation, like: Tensor) -> int:
    length = relation.weight.shape[1]
    budget = _CPU_TILE_BYTES if like.device.type == "cpu" else _DEVICE_TILE_BYTES
    row_bytes = max(1, relation.heads * length) * like.element_size()
    return max(1, min(budget // row_bytes, length))


def _model(
    queries: Tensor, keys: Tensor | None, relation: Relation, example: int, dtype: torch.dtype
) -> _Model:
    valid = None if relation.valid is None else relation.valid[example]
    split = split_heads(queries[example], valid, relation.heads, dtype)
    if keys is None:
        return _Model(split, split)
    return _Model(split, split_heads(keys[example], valid, relation.heads, dtype))


def _zero_sums(student: _Model, *, wants_queries: bool, wants_keys: bool) -> _Gradients:
    def zeros() -> Tensor:
        return torch.zeros_like(student.queries, memory_format=torch.contiguous_format)

    queries = zeros() if wants_queries else None
    if student.keys is student.queries:
        return _Gradients(queries, queries)
    return _Gradients(queries, zeros() if wants_keys else None)


def _tile(relation: Relation, example: int, rows: slice, scratch: Tensor) -> _Tile:
    length = relation.weight.shape[1]
    keys = slice(0, rows.stop if relation.causal else length)
    shape = (relation.heads, rows.stop - rows.start, keys.stop)
    buffers = scratch[:, : math.prod(shape)].unflatten(1, shape)
    weight = relation.weight[example, rows] / relation.heads
    return _Tile(rows, keys, _hidden_pairs(relation, example, rows, keys), weight, buffers)


def _hidden_pairs(relation: Relation, example: int, rows: slice, keys: slice) -> Tensor | None:
    hidden = None
    if relation.valid is not None:
        hidden = ~relation.valid[example, None, keys]
    if relation.segments is not None:
        segments = relation.segments[example]
        differ = segments[rows, None] != segments[None, keys]
        hidden = differ if hidden is None else hidden | differ
    if relation.causal:
        positions = torch.arange(keys.stop, device=relation.weight.device)
        later = positions[None, keys] > positions[rows, None]
        hidden = later if hidden is None else hidden | later
    return hidden


def _add_tile(tile: _Tile, student: _Model, teacher: _Model, sums: _Gradients) -> Tensor:
    """Return the loss of the tile and add its gradients to `sums`."""
    scores, log_q, log_p = tile.buffers
    # torch's log_softmax subtracts the maximum and log Z separately.
    torch.log_softmax(_scores_into(scores, student, tile), -1, out=log_q)
    torch.log_softmax(_scores_into(scores, teacher, tile), -1, out=log_p)
    p = torch.exp(log_p, out=scores)
    rows = log_p.sub_(log_q).mul_(p).sum(-1).clamp_(min=0)  # [A, R]
    if sums.queries is not None or sums.keys is not None:
        _add_gradients(log_q.exp_().sub_(p), tile, student, sums)
    return (rows * tile.weight).sum()


def _scores_into(out: Tensor, model: _Model, tile: _Tile) -> Tensor:
    queries, keys = model.queries[:, tile.rows], model.keys[:, tile.keys].transpose(1, 2)
    torch.baddbmm(out, queries, keys, beta=0, alpha=_scale(model), out=out)
    return out if tile.hidden is None else out.masked_fill_(tile.hidden, _HIDDEN_SCORE)


def _add_gradients(gap: Tensor, tile: _Tile, student: _Model, sums: _Gradients) -> None:
    """Add the gradients of one tile to `sums`; `gap` is q - p, [A, R, K]."""
    factor = (tile.weight * _scale(student))[:, None]
    if sums.queries is not None:
        sums.queries[:, tile.rows] += torch.bmm(gap, student.keys[:, tile.keys]).mul_(factor)
    if sums.keys is not None:
        queries = student.queries[:, tile.rows] * factor
        sums.keys[:, tile.keys].baddbmm_(gap.transpose(1, 2), queries)


def _store(out: Tensor, sums: Tensor | None, example: int) -> None:
    """Write [A, L, d] to out[example], [L, A * d]."""
    if sums is not None and out.numel():
        out[example].unflatten(-1, (len(sums), -1)).copy_(sums.transpose(0, 1))


def _scale(model: _Model) -> float:
    return 1 / math.sqrt(model.queries.shape[-1])
