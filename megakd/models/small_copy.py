"""A small copy of a model with random weights, whose function decides what can be done with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from megakd.contract.tasks import TaskType
from megakd.errors import ModelError, one_line
from megakd.models.architectures import NARROW, stated
from megakd.models.valueless import new_model, no_cache, without_values
from megakd.process.seeding import cpu_seeded

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 112,  # no multiple of the width
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
    "pad_token_id": 1,  # no token of a copy is below 5; some families count positions from it
}
"""Sizes of a small copy; a family that refuses some of them has others, see `small_configs`."""
WIDTHS_OF_EMBEDDINGS = ("embedding_size", "word_embed_proj_dim")
"""Keys of embeddings from which a matrix makes hidden states, if these are wider."""
WINDOW = 8
"""Positions of a window or a chunk: fewer than in a row, so that layers with and without differ."""
WINDOWS = (
    *("sliding_window", "attention_chunk_size", "attention_window_size", "window_size"),
    *("local_attention", "chunk_size", "mamba_chunk_size"),
)
LARGEST = 100_000_000
"""Most weights of a copy."""
NOISE = 0.05
"""Of random weights: those of a new model hardly mix tokens, and its norms are all alike."""
TOKENS = 5 + torch.arange(24)[None] * 7 % 400
"""A row without special tokens."""
T = TypeVar("T")


def small_configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield configs of small copies, the smallest first; their model may refuse some of them."""
    queries, keys = (stated(config, f"num_{of}_heads") for of in ("attention", "key_value"))
    sizes = dict(SIZES)
    if keys is not None:
        # More groups than one, even of a model with one: another order would not show anything.
        sizes["num_key_value_heads"] = 4 if keys == queries else 2
    yield _with_sizes(config, sizes)
    del sizes["head_dim"]
    yield _with_sizes(config, sizes)
    # Sections of rotary positions may have to fill a head.
    width = (stated(config, "hidden_size") or 64) // (queries or 1)
    yield _with_sizes(config, {**sizes, "hidden_size": 4 * width, "intermediate_size": 7 * width})
    less = ("num_key_value_heads", "intermediate_size")
    yield _with_sizes(config, {key: size for key, size in sizes.items() if key not in less})
    yield _with_sizes(config, {})


def widths_of(config: Any, width: int | None) -> dict[str, int]:
    """Return the values of the keys that state the width of hidden states."""
    changes = {"hidden_size": width or config.hidden_size}
    for key in WIDTHS_OF_EMBEDDINGS:
        # ELECTRA's embeddings may have another width, which does not change.
        embeddings = getattr(config, key, None)
        if embeddings == config.hidden_size:
            changes[key] = changes["hidden_size"]
        elif embeddings is not None and embeddings == width:
            raise ModelError(
                f"the view keeps a width of {width}, which is the {key} of the "
                f"{config.model_type} model: at equal widths the class has no projection from the "
                "embeddings, and their weights would be lost; keep another width"
            )
    return changes


def _with_sizes(config: PretrainedConfig, sizes: Mapping[str, int]) -> PretrainedConfig:
    small: Any = copy.deepcopy(config)
    vars(small).pop(NARROW, None)
    width = stated(config, "hidden_size")
    for key in WIDTHS_OF_EMBEDDINGS if "hidden_size" in sizes else ():
        is_wide = stated(config, key) == width
        sizes = {**sizes, key: sizes["hidden_size"] if is_wide else sizes["hidden_size"] // 2}
    for key, size in {**sizes, **dict.fromkeys(WINDOWS, WINDOW)}.items():
        is_computed = isinstance(getattr(type(small), key, None), property)
        if not is_computed and stated(small, key) is not None:
            setattr(small, key, size)
    return small


def first_copy(
    config: PretrainedConfig, task: TaskType, make: Callable[[PretrainedConfig], T]
) -> tuple[T | None, str]:
    """Return what `make` returns for the first config of a small copy that it does not refuse.

    Returns:
        It, or None if all are refused or too large, and the reason for the last one.
    """
    failed = "it has none"
    for small in small_configs(config):
        try:
            weights = without_values(small, task).parameters()
            if sum(weight.numel() for weight in weights) <= LARGEST:
                return make(small), ""
            failed = "it is too large"
        except Exception as error:  # noqa: BLE001 - a family may refuse sizes in its own way
            failed = one_line(error)
    return None, failed


def copy_that_runs(
    config: PretrainedConfig, task: TaskType, *, tokens: Tensor, attention: str | None = None
) -> PreTrainedModel | None:
    """Return the first small copy that computes logits of the tokens in fp32; None: none does."""

    def running(small: PretrainedConfig) -> PreTrainedModel:
        model = new_copy(small, task, dtype=torch.float32, attention=attention)
        with torch.no_grad():
            logits_of(model, tokens)
        return model

    return first_copy(config, task, running)[0]


def new_copy(
    config: PretrainedConfig, task: TaskType, *, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    """Build the model of a config for a task, always with the same random weights."""
    with cpu_seeded(0), torch.no_grad():
        model = new_model(config, task, dtype=dtype, attn_implementation=attention)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=NOISE)
    return model.eval()


def logits_of(model: PreTrainedModel, tokens: Tensor, **inputs: Tensor) -> Tensor:
    """Return the logits of tokens [B, T], computed without a cache."""
    return model(input_ids=tokens, **inputs, **no_cache(model)).logits
