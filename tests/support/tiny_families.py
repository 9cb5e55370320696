"""Tiny random models of every family of transformers that can be made small."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
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


def small_configs(model_type: str, task: str, layers: int = 2) -> Iterator[Any]:
    """Small configs, of which models for the task can be built, though perhaps not run."""
    for without in WITHOUT:
        keys = {key: size for key, size in SMALL.items() if key not in without}
        keys |= {"num_hidden_layers": layers, **OWN.get(model_type, {})}
        try:
            config = CONFIG_MAPPING[model_type](**keys)
            with torch.device("meta"):
                model = AUTO_CLASSES[task].from_config(config)
        except Exception:  # noqa: BLE001, S112 - any family may refuse a size in its own way
            continue
        if sum(weight.numel() for weight in model.parameters()) <= LARGEST:
            yield config


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
