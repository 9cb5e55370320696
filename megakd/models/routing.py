"""What routers of a mixture of experts give for a loss that balances the experts."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, cast

from megakd.data.batch import Routing
from megakd.models.architectures import class_for

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

LOSS = "load_balancing_loss_func"
"""Name of the loss in the modelling files of families whose language models add it to theirs."""
ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
"""Of the loss with the formula that `losses.router_balance` has; Doge has another one."""
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""Attributes of these models: the factor of the loss."""
ASKED = {"output_router_logits": True}
"""Argument of their forward."""


def has_balance(config: PretrainedConfig) -> bool:
    """Return whether the loss of a family's language model has a term for its routers."""
    model_class = class_for(config, "causal_lm")
    return model_class is not None and _adds_balance(model_class)


@functools.cache
def _adds_balance(model_class: type) -> bool:
    # Through decorators, and the class that is laid over that of a cut model.
    for one in model_class.__mro__:
        loss = getattr(sys.modules.get(one.__module__), LOSS, None)
        forward = vars(one).get("forward")
        if loss is not None and forward is not None:
            is_called = LOSS in inspect.unwrap(forward).__code__.co_names
            return is_called and [*inspect.signature(loss).parameters] == ARGUMENTS
    return False


def balance_of(model: nn.Module) -> Routing | None:
    """Return how a language model that learns balances its experts, without router logits.

    None: its family adds no such loss, its coefficient is 0, or the model does not learn.
    """
    if not (model.training and _adds_balance(type(model))):
        return None
    values = (getattr(model, key, None) for key in COEFFICIENTS)
    coefficient = next((cast("float", one) for one in values if one is not None), 0.0)
    chosen = cast("int", getattr(model, "num_experts_per_tok", 0))
    return Routing((), chosen, coefficient) if coefficient else None
