"""Experts of models without values, whose tokens cannot be sorted by their experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from megakd.models.architectures import architecture_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONE_EXPERT = "one_expert"
"""Name of this computation in configs of models."""


def send_tokens_to_one_expert(model: PreTrainedModel) -> None:
    """Let a mixture on the meta device use one expert of each layer for all tokens.

    The tensors have the shapes of transformers' grouped product, which the meta device supports
    only in bf16, and the products have as many operations. A dense model does not change.
    """
    if architecture_of(model.config).experts is not None:
        ALL_EXPERTS_FUNCTIONS.register(ONE_EXPERT, _of_one_expert)
        model.set_experts_implementation(ONE_EXPERT)


def _of_one_expert(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    rows = hidden.repeat_interleave(chosen.shape[1], dim=0)  # [N * k, D]
    # transformers gives its modules this method.
    gated = experts._apply_gate(_linear(experts, "gate_up_proj", rows))  # noqa: SLF001
    outputs = _linear(experts, "down_proj", gated) * weights.reshape(-1, 1)
    return outputs.unflatten(0, chosen.shape).sum(1).to(hidden.dtype)


def _linear(experts: nn.Module, name: str, rows: Tensor) -> Tensor:
    weight = experts.get_parameter(name)[0]
    product = rows @ (weight if experts.is_transposed else weight.T)
    return product + experts.get_parameter(f"{name}_bias")[0] if experts.has_bias else product
