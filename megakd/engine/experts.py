"""Mixtures of experts under ZeRO 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepspeed.utils import set_z3_leaf_module

if TYPE_CHECKING:
    from torch import nn

EXPERTS = "experts"
"""Name of the child with the experts, in every block of transformers that routes tokens."""


def gather_experts_together(model: nn.Module) -> None:
    """Let ZeRO 3 gather each block of experts as a whole; call before `deepspeed.initialize`.

    ZeRO 3 gathers the weights of a module when the forward of the module begins. If the experts are
    modules, each rank calls the experts of its own tokens: the ranks would gather different weights
    with one collective. A block that ZeRO 3 treats as a leaf is gathered by all ranks alike.

    Args:
        model: any model; the function does nothing without blocks of experts or without ZeRO 3.
    """
    for module in model.modules():
        if hasattr(module, EXPERTS):
            set_z3_leaf_module(module, flag=True)
