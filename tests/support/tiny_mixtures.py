"""Tiny mixtures of experts: their configs, and folders with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COEFFICIENT = {"router_aux_loss_coef": 0.5}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "v_head_dim": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, **COEFFICIENT},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, **COEFFICIENT},
    "olmoe": {"num_experts": 4, **COEFFICIENT},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 6, **COEFFICIENT},
    "granitemoe": {"num_local_experts": 4, "initializer_range": 0.2, **COEFFICIENT},
    # No loss balances its experts; a shared one is beside them, and the first layer has none.
    "deepseek_v3": {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        **LATENT,
        "qk_rope_head_dim": 4,
    },
}


def keys_of(family: str, layers: int = 2, **changes: Any) -> dict[str, Any]:
    """Keys of a config, with which routers choose between experts that differ."""
    usual = {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 2,
        "initializer_range": 0.5,
    }
    return {**usual, **FAMILIES.get(family, {}), **changes}


def write_mixture(
    folder: Path, family: str, texts: Sequence[str], *, layers: int = 2, **changes: Any
) -> Path:
    """Write a mixture with random weights, and a tokenizer of the texts."""
    import torch
    from tiny_runs import save_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**keys_of(family, layers, vocab_size=300, **changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return save_tokenizer(folder, texts, kind="bpe")
