"""Models of transformers without values, on the meta device."""

from __future__ import annotations

import copy
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel, initialization
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from megakd.contract.tasks import TaskType
from megakd.models.architectures import AUTO_CLASSES, class_for, narrow_maps
from megakd.models.own_models import register_own_models

VALUELESS = torch.device("meta")
_PASSED_BY = "passed_by"
"""Name of experts that return their input, whatever the router chooses."""


class Valueless(TorchFunctionMode):
    """Mode for the meta device: conditions on values are False, and read values are zero."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = args[0] if args else None
        if isinstance(tensor, Tensor) and tensor.is_meta:
            if func in (Tensor.__bool__, Tensor.__contains__):
                return False
            if func is Tensor.item:
                return 0.0 if tensor.is_floating_point() else 0
            if func is Tensor.tolist:
                return torch.zeros_like(tensor, device="cpu").tolist()
            if func is torch.unique_consecutive:  # as many end tokens in every text
                return tensor[:1]
        return func(*args, **(kwargs or {}))


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


def no_cache(model: nn.Module) -> dict[str, Any]:
    """Return the argument of a forward that keeps a decoder from filling a cache.

    A decoder with recurrent layers fails without it, and an encoder does not accept it.
    """
    arguments = signature(model.forward).parameters
    takes_more = any(one.kind is one.VAR_KEYWORD for one in arguments.values())
    is_taken = "use_cache" in arguments or (takes_more and hasattr(model.config, "use_cache"))
    return {"use_cache": False} if is_taken else {}
