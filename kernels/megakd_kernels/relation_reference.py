"""The relation loss in plain eager torch, the reference for tests of the other code paths.

It forms [B, A, L, L] twice and leaves the gradient to autograd. Computation is in fp32, or in
fp64 if an input is fp64.
Shapes: B batch, L positions, D width, A relation heads, d = D / A head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd_kernels.inputs import compute_dtype, without_autocast


class Relation(NamedTuple):
    """Inputs of every path of the relation loss, checked by `relation_kl_loss`.

    student_queries: [B, L, Ds], teacher_queries [B, L, Dt]; any strides.
    student_keys, teacher_keys: the same shapes, or both None for a self relation.
    valid: [B, L] bool, positions that are seen and count; None: all. Others may hold anything.
    segments: [B, L] integers; positions of different segments do not see each other.
    weight: [B, L] of the compute dtype, weight of each query row, exactly 0 where not valid.
    heads: relation heads A.
    causal: a position does not see later positions.
    """

    student_queries: Tensor
    student_keys: Tensor | None
    teacher_queries: Tensor
    teacher_keys: Tensor | None
    valid: Tensor | None
    segments: Tensor | None
    weight: Tensor
    heads: int
    causal: bool


def relation_kl_reference(relation: Relation) -> Tensor:
    """Return the weighted sum over rows of the mean over heads of KL(teacher || student), nats."""
    dtype = compute_dtype(relation.student_queries, relation.teacher_queries)
    visible = visible_pairs(relation)
    with without_autocast(relation.weight.device):
        log_q = _log_relation(relation.student_queries, relation.student_keys, relation, dtype)
        log_p = _log_relation(relation.teacher_queries, relation.teacher_keys, relation, dtype)
        log_q = log_q.masked_fill(~visible, 0)
        log_p = log_p.detach()
        terms = log_p.exp() * (log_p.masked_fill(~visible, 0) - log_q)
        rows = (terms * visible).sum(-1).mean(1)  # [B, L]
        return (rows * relation.weight).sum()


def visible_pairs(relation: Relation) -> Tensor:
    """Return [B, 1, L, L] bool: whether row i sees position j; invalid rows see nothing."""
    batch, length = relation.weight.shape
    visible = relation.weight.new_ones(batch, length, length, dtype=torch.bool)
    if relation.valid is not None:
        visible = relation.valid[:, :, None] & relation.valid[:, None, :]
    if relation.segments is not None:
        visible = visible & (relation.segments[:, :, None] == relation.segments[:, None, :])
    return (visible.tril() if relation.causal else visible)[:, None]


def _log_relation(
    queries: Tensor, keys: Tensor | None, relation: Relation, dtype: torch.dtype
) -> Tensor:
    """Return [B, A, L, L]: log softmax of the scaled scores over the visible keys."""
    valid, heads = relation.valid, relation.heads
    queries = split_heads(queries, valid, heads, dtype)
    keys = queries if keys is None else split_heads(keys, valid, heads, dtype)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    # Finite, so that a row that sees nothing, whose weight is 0, has no NaN.
    scores = scores.masked_fill(~visible_pairs(relation), torch.finfo(dtype).min)
    return F.log_softmax(scores, dim=-1)


def split_heads(tensor: Tensor, valid: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor:
    """Reshape [..., L, D] to [..., A, L, d], with zeros where not valid."""
    if valid is not None:
        tensor = tensor.masked_fill(~valid[..., None], 0)
    return tensor.to(dtype).unflatten(-1, (heads, -1)).transpose(-3, -2)
