"""Tiny random models of every family of transformers that can be made small."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from inspect import signature
from itertools import product
from typing import Any

import torch
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megakd.models.architectures import AUTO_CLASSES

TYPES = {
    "causal_lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "mlm": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A family that does not know a key may refuse it: tried in this order.
WITHOUT = (
    (),
    ("head_dim",),
    ("head_dim", "num_key_value_heads"),
    ("head_dim", "num_key_value_heads", "intermediate_size"),
)
LARGEST = 30_000_000
"""Most weights of a tiny model; a family above needs sizes of its own."""


OWN = {
    "xmod": {"default_language": "en_XX"},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    # Attentions with latent vectors have as many key heads as heads.
    **{
        model_type: {"num_key_value_heads": 4}
        for model_type in (
            *("deepseek_v3", "deepseek_v32", "youtu", "axk2", "minicpm3"),
            *("glm4_moe_lite", "glm_moe_dsa"),
        )
    },
}
"""Keys without which a tiny model of a family does not run."""

PARTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "n_group"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    # Attentions with latent vectors have as many key heads as heads.
    **dict.fromkeys(("num_key_value_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "state_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("linear_num_key_heads", "altup_num_inputs"), 2),
    "q_lora_rank": 32,
    "vocab_size_per_layer_input": 512,
    "sliding_window": 8,
}
"""Sizes of parts, of families that are large or do not run without them."""
LATE_ATTENTION = ["sliding_attention"] * 2 + ["full_attention"] * 2
OF_FAMILIES: dict[str, dict[str, Any]] = {
    family: {"layer_types": LATE_ATTENTION, "num_kv_shared_layers": 1}
    for family in ("gemma3n_text", "gemma4_text")
}
OF_FAMILIES["gemma3n_text"]["activation_sparsity_pattern"] = [0.0, 0.0, 0.95, 0.0]
OF_FAMILIES |= {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4},
    },
}
"""Keys of these families besides."""


def small_configs(model_type: str, task: str, layers: int = 2) -> Iterator[Any]:
    """Small configs, of which models for the task can be built, though perhaps not run."""
    parts = _parts_of(model_type, layers)
    for more, without in product(({}, parts) if parts else ({},), WITHOUT):
        keys = {**SMALL, "num_hidden_layers": layers, **OWN.get(model_type, {}), **more}
        try:
            keys = {key: size for key, size in keys.items() if key not in without}
            config = CONFIG_MAPPING[model_type](**keys)
            with torch.device("meta"):
                model = AUTO_CLASSES[task].from_config(config)
        except Exception:  # noqa: BLE001, S112 - any family may refuse a size in its own way
            continue
        if sum(weight.numel() for weight in model.parameters()) <= LARGEST:
            yield config


def _parts_of(model_type: str, layers: int) -> dict[str, Any]:
    # The sizes of `PARTS` that the config of a family states.
    own = OF_FAMILIES.get(model_type, {})
    known = signature(CONFIG_MAPPING[model_type]).parameters
    parts = {key: size for key, size in PARTS.items() if key in known}
    if not own and set(parts) <= {"num_key_value_heads", "sliding_window"}:
        return {}
    if model_type.startswith("gemma4"):
        parts["global_head_dim"] = 16
    return parts | {k: v[-layers:] if isinstance(v, list) else v for k, v in own.items()}


@cache
def small_config(model_type: str, task: str, layers: int = 2) -> Any:
    """A small config, of which a model for the task can be built; None: there is none."""
    return next(small_configs(model_type, task, layers), None)


def build(config: Any, task: str, seed: int = 0) -> Any:
    """A model with random values, those of norms and biases too."""
    torch.manual_seed(seed)
    model = AUTO_CLASSES[task].from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.add_(torch.randn_like(weight), alpha=0.05)
        for part in model.modules():
            if isinstance(part, torch.nn.Embedding) and part.padding_idx is not None:
                part.weight[part.padding_idx] = 0  # as some families set it when they load
    return model
