"""Attention within the documents of packed rows, without a mask.

A mask of packed rows has an element for every pair of positions, keeps fused attention from its
fast path, and makes the host wait for the device when transformers builds the mask. Here the
boundaries of the documents come from the collator. On a GPU, torch's attention for sequences of
different lengths skips everything outside of a document and after a query; on a CPU the documents
are computed one after the other.
"""

from __future__ import annotations

from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

# torch 2.11 has no grouped queries here; later versions do.
_GROUPS_QUERIES = "enable_gqa" in signature(varlen_attn).parameters
VARLEN = "varlen"
"""Name of this attention in configs of models and in `attn_implementation`."""


def register_packed_attention() -> None:
    """Make transformers know this attention; no mask belongs to the name."""
    AttentionInterface.register(VARLEN, attend)


def attend(  # noqa: PLR0913  (the arguments are transformers')
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Return causal attention within documents, as transformers calls its attentions.

    Args:
        query: [B, heads, T, width].
        key: [B, key heads, T, width].
        scaling: factor of the scores; None: 1 / sqrt(width).
        sliding_window: number of positions that a query sees, itself included; None: all.
        cu_seq_lens_q: [documents + 1] int32, the first position of each document in [B * T], and
            B * T; None: every row is a document.
        max_length_q: length of the longest document.

    Returns:
        [B, T, heads, width], and no attention weights.
    """
    del module, attention_mask, unused
    batch, _, length, _ = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(
            0, (batch + 1) * length, length, dtype=torch.int32, device=query.device
        )
        max_length_q = length
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]  # [B * T, heads, w]
    if query.is_cuda:
        grouped: dict[str, Any] = {}
        if query.shape[1] != key.shape[1]:
            if _GROUPS_QUERIES:
                grouped = {"enable_gqa": True}
            else:
                groups = query.shape[1] // key.shape[1]
                flat[1:] = [part.repeat_interleave(groups, dim=1) for part in flat[1:]]
        out: Any = varlen_attn(
            flat[0],
            flat[1],
            flat[2],
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            **grouped,
        )
    elif query.is_meta:
        out = _without_values(flat, length if length % max_length_q else max_length_q)
    else:
        out = _one_by_one(flat, cu_seq_lens_q.tolist(), scaling, sliding_window)
    return out.unflatten(0, (batch, length)), None


def _one_by_one(
    flat: list[Tensor], starts: list[int], scaling: float | None, window: int | None
) -> Tensor:
    """Return the attention of every document, [B * T, heads, width]."""
    heads, key_heads = flat[0].shape[1], flat[1].shape[1]
    parts = []
    for first, end in pairwise(starts):
        query, key, value = (part[first:end].transpose(0, 1) for part in flat)
        near = None  # [T, T] bool: True where a query sees a key
        if window is not None and end - first > window:
            near = query.new_ones(end - first, end - first, dtype=torch.bool).tril()
            near = near.triu(1 - window)
        parts.append(
            functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=near,
                is_causal=near is None,
                scale=scaling,
                enable_gqa=heads != key_heads,
            ).transpose(0, 1)
        )
    return torch.cat(parts)


def _without_values(flat: list[Tensor], longest: int) -> Tensor:
    """Return the attention of documents of one length, for a memory plan; [B * T, heads, width]."""
    query, key, value = (part.unflatten(0, (-1, longest)).transpose(1, 2) for part in flat)
    is_grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=is_grouped
    )
    return out.transpose(1, 2).flatten(0, 1)
