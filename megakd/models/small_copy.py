"""Models without values, and a small copy whose function decides what can be done with a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel, initialization
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from megakd.config.task import TaskType
from megakd.errors import ModelError, one_line
from megakd.models.architectures import (
    AUTO_CLASSES,
    NARROW,
    class_for,
    narrow_maps,
    register_own_models,
    stated,
)
from megakd.process.seeding import cpu_seeded

VALUELESS = torch.device("meta")

_PASSED_BY = "passed_by"
"""Name of experts that return their input, whatever the router chooses."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread of the CPU in the body."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Valueless(TorchFunctionMode):
    """Mode for the meta device: unknown conditions are False, and unknown values are zero.

    torch's checks of arguments hold. In a forward, numbers that code makes tensors of have their
    value, from which sizes may follow; while a model is built, they may become weights.

    Args:
        is_forward: whether a forward runs.
    """

    def __init__(self, *, is_forward: bool = False) -> None:
        super().__init__()
        self._is_forward = is_forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor, kwargs = args[0] if args else None, kwargs or {}
        if self._is_forward and func is torch.tensor and isinstance(tensor, int | float):
            kwargs = {**kwargs, "device": "cpu"}
        if isinstance(tensor, Tensor) and tensor.is_meta:
            if func in (Tensor.__bool__, Tensor.__contains__):
                return False
            if getattr(func, "__name__", "") == "_is_all_true":  # how distributions check arguments
                return torch.ones((), dtype=torch.bool, device="cpu")
            if func in (Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.__index__):
                return 0.0 if tensor.is_floating_point() else 0
            if func is Tensor.tolist:
                return torch.zeros_like(tensor, device="cpu").tolist()
            if func is torch.unique_consecutive:  # as many end tokens in every text
                return tensor[:1]
            if func is Tensor.__getitem__:
                args = (tensor, _with_zeros(args[1]))
            if func is Tensor.split and len(args) > 1 and isinstance(args[1], list):
                dim = (*args[2:], kwargs.get("dim", 0))[0]
                if not any(args[1]):  # unknown numbers of tokens by expert
                    args = (tensor, [tensor.shape[dim], *args[1][1:]], *args[2:])
        return func(*args, **kwargs)


def _with_zeros(index: object) -> object:
    # An index whose unknown numbers, such as that of an expert, are zero.
    if isinstance(index, tuple):
        return tuple(map(_with_zeros, index))
    if isinstance(index, Tensor) and index.is_meta and index.dim() == 0:
        return index if index.dtype is torch.bool else 0
    return index


def new_model(config: PretrainedConfig, task: TaskType, **options: Any) -> PreTrainedModel:
    """Build the model of a config for a task, on the current device.

    Args:
        options: of `from_config`, such as `dtype` and `attn_implementation`.
    """
    register_own_models()
    if narrow_maps(config) is not None:
        options.pop("trust_remote_code", None)
        return cast("Any", class_for(config, task))._from_config(copy.deepcopy(config), **options)  # noqa: SLF001  (what from_config calls)
    # Code beside the weights that has made the config may make the model.
    is_remote = type(config).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)
    options = {"trust_remote_code": is_remote, **options}
    return AUTO_CLASSES[task].from_config(copy.deepcopy(config), **options)


def without_values(config: PretrainedConfig, task: TaskType) -> PreTrainedModel:
    """Return a model on the meta device, whose experts pass their input on."""
    with Valueless(), VALUELESS, initialization.no_init_weights():
        model = new_model(config, task, attn_implementation="eager")
    model.tie_weights()
    ALL_EXPERTS_FUNCTIONS.register(_PASSED_BY, lambda experts, hidden, *chosen: hidden)
    if any(hasattr(type(part), "_apply_gate") for part in model.modules()):
        model.set_experts_implementation(_PASSED_BY)
    return model.eval()


def experts_in(model: nn.Module) -> str | None:
    """Return the path of the first block that routes tokens to experts; None: the model is dense.

    transformers gives the modules of experts a gate, or their block is named.
    """
    for path, part in model.named_modules():
        if hasattr(type(part), "_apply_gate") or path.endswith((".experts", ".moe")):
            return path.rpartition(".")[0]
    return None


def no_cache(model: nn.Module) -> dict[str, Any]:
    """Return the argument of a forward that keeps a decoder from filling a cache.

    A decoder with recurrent layers fails without it, and an encoder does not accept it.
    """
    arguments = signature(model.forward).parameters
    takes_more = any(one.kind is one.VAR_KEYWORD for one in arguments.values())
    is_taken = "use_cache" in arguments or (takes_more and hasattr(model.config, "use_cache"))
    return {"use_cache": False} if is_taken else {}


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
