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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from megakd.contract.batch import Batch
from megakd.contract.tasks import TaskType
from megakd.errors import ModelError
from megakd.models.architectures import architecture_of
from megakd.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# torch 2.11 has no grouped queries here; later versions do.
_GROUPS_QUERIES = "enable_gqa" in signature(varlen_attn).parameters
VARLEN = "varlen"
"""Name of this attention in configs of models and in `attn_implementation`."""


def register_packed_attention() -> None:
    """Make transformers know this attention; no mask belongs to the name."""
    AttentionInterface.register(VARLEN, attend)


def document_arguments(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the arguments of a decoder's forward that state the documents of its rows."""
    config: PretrainedConfig = model.config  # type: ignore[assignment]
    name: str = config._attn_implementation or ""  # noqa: SLF001
    if not name.startswith((VARLEN, "flash_attention")):
        if architecture_of(config).masks_documents or "position_ids" not in batch.inputs:
            return {}
        # Masks by type of layer, for a backbone that ignores positions.
        table, positions = model.get_input_embeddings().weight, batch.inputs["position_ids"]  # type: ignore[operator]
        # Its shape, dtype and device are read; a sharded table of embeddings is empty here.
        hidden = table.new_empty((*positions.shape, 0))
        # Neither a mask nor a cache, which transformers 5.24 names otherwise.
        facts: Any = (config, hidden, None, None, positions)
        full, sliding = create_causal_mask(*facts), create_sliding_window_causal_mask(*facts)
        return {"attention_mask": {"full_attention": full, "sliding_attention": sliding}}
    if batch.documents is None:
        return {}
    starts, longest = batch.documents
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def set_attention(
    model: PreTrainedModel, source: ModelSource, task: TaskType, device: torch.device
) -> None:
    """Choose the attention of a loaded model.

    Without `attn_implementation`, packed rows on a GPU use `varlen` if torch's kernel supports the
    model; transformers chooses elsewhere.
    """
    register_packed_attention()
    config, wanted = model.config, source.attn_implementation
    lacking = architecture_of(config).lacking_in_fused_attention(config)
    if lacking is not None and wanted in (VARLEN, "sdpa"):
        raise ModelError(
            f"{source.where.removesuffix('.model')}.attn_implementation: the {config.model_type} "
            f"model has {lacking}, which {wanted} does not support; use eager, or remove the key"
        )
    name = attention_name(model, source, task, device)
    if name == VARLEN and device.type == "cuda" and not _has_kernel(model):
        raise ModelError(
            f"{source.where.removesuffix('.model')}.attn_implementation: varlen needs bf16 or "
            "fp16 on a GPU, no attention dropout, and heads of at most 256 columns, a multiple of "
            "8; use sdpa"
        )
    if name is not None:
        model.set_attn_implementation(name)


def attention_name(
    model: PreTrainedModel, source: ModelSource, task: TaskType, device: torch.device
) -> str | None:
    """Return the attention that a model uses on a device; None: transformers chooses."""
    is_packed = task == "causal_lm" and device.type == "cuda"
    if source.attn_implementation is None and is_packed and _has_kernel(model):
        return VARLEN
    return source.attn_implementation


def _has_kernel(model: PreTrainedModel) -> bool:
    config = model.config
    if architecture_of(config).lacking_in_fused_attention(config) is not None:
        return False
    width = architecture_of(config).heads(config).width
    dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    is_narrow = model.dtype in (torch.bfloat16, torch.float16)
    return is_narrow and not dropout and width % 8 == 0 and width <= 256


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
