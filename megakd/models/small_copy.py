"""A small copy of a model, with all its layers and random weights, whose function is looked at."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from megakd.contract.tasks import TaskType
from megakd.models.architectures import AUTO_CLASSES
from megakd.models.valueless import is_remote, no_cache
from megakd.process.seeding import cpu_seeded

logger = logging.getLogger(__name__)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rotary_dim": 8,
    "vocab_size_per_layer_input": 512,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    # Experts, in as many groups as before.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    # Recurrent layers of twice the width, in 8 heads.
    **dict.fromkeys(("num_heads", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    "mamba_d_ssm": 128,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    # Windows are narrower than the row, so that layers with and without one differ.
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "local_attention": 8,
    "window_size": 8,
    "pad_token_id": 1,  # no token of a copy is below 5; some families count positions from it
}
"""Sizes of a small copy; a family that refuses some of them has its own, in the order below."""
LEFT_AS_THEY_ARE = (
    (),
    ("head_dim",),
    ("head_dim", "num_key_value_heads"),
    ("head_dim", "num_key_value_heads", "intermediate_size"),
    tuple(SMALL),
)
_HEADS = ("attention", "key_value")
LARGEST = 300_000_000
"""Most weights of a copy."""
NOISE = 0.05
"""Of random weights: those of a new model hardly mix tokens, and its norms are all alike."""
TOKENS = 5 + torch.arange(24)[None] * 7 % 400
"""A row without special tokens."""


def small_copies(
    config: PretrainedConfig, task: TaskType, *, tokens: Tensor, attention: str | None = None
) -> Iterator[PreTrainedModel]:
    """Yield the first small copy that computes logits of the tokens; nothing if none does."""
    for left in LEFT_AS_THEY_ARE:
        try:
            small = _small(config, left)
            with torch.device("meta"):
                empty = built(small, task, attention)
            if sum(weight.numel() for weight in empty.parameters()) > LARGEST:
                continue
            with cpu_seeded(0), torch.no_grad():
                model = built(small, task, attention)
                disturb(model)
                logits_of(model, tokens)
        except Exception as error:  # noqa: BLE001 - a family may refuse sizes in its own way
            logger.debug("no copy without %s: %s", left, error)
            continue
        yield model
        return


def _small(config: PretrainedConfig, left: Collection[str]) -> PretrainedConfig:
    small: Any = copy.deepcopy(config)
    queries, keys = (getattr(config, f"num_{kind}_heads", None) for kind in _HEADS)
    for key, size in SMALL.items():
        if key not in left and getattr(small, key, None) is not None:
            setattr(small, key, size)
    if keys is not None and queries == keys and "num_key_value_heads" not in left:
        small.num_key_value_heads = SMALL["num_attention_heads"]  # no head shares its keys
    return small


def built(config: PretrainedConfig, task: TaskType, attention: str | None) -> PreTrainedModel:
    """Build the model of a config for a task, in fp32 and without dropout."""
    return (
        AUTO_CLASSES[task]
        .from_config(
            config,
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=is_remote(config),
        )
        .eval()
    )


def disturb(model: PreTrainedModel) -> None:
    """Add noise to all weights of a new model."""
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight), alpha=NOISE)


def logits_of(model: PreTrainedModel, tokens: Tensor, **inputs: Tensor) -> Tensor:
    """Return the logits of tokens [B, T], computed without a cache."""
    return model(input_ids=tokens, **inputs, **no_cache(model)).logits
