"""Backward of operators whose gradients were formed in the forward.

An operator returns its total first. Its last outputs are the formed gradients, one per
differentiable input (empty if the gradient was not requested). The backward multiplies the formed
gradients by the upstream gradient, in fp32, and casts once. Nothing is changed in place, so a
retained graph gives the same result again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def register_formed_gradients(operator: Any, positions: Sequence[int]) -> None:
    """Register the backward of `operator`.

    Args:
        operator: a `torch.library.custom_op`; its first output is the total, its last
            len(positions) outputs are the formed gradients.
        positions: positions of the arguments that the gradients belong to, in output order.
    """
    operator.register_autograd(_backward(tuple(positions)), setup_context=_saver(tuple(positions)))


def refuse_second_derivative() -> None:
    """Raise if the calling backward is itself differentiated.

    The backward returns constants, so a derivative of its result would be silently wrong.

    Raises:
        RuntimeError: autograd records the backward for a second one.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused losses do not support second derivatives (create_graph=True); use "
            "impl='reference'"
        )


def _saver(positions: tuple[int, ...]) -> Callable[..., None]:
    def setup_context(
        ctx: Any,
        inputs: tuple[Any, ...],
        output: tuple[Tensor, ...],
        keyword_only_inputs: dict[str, Any] | None = None,
    ) -> None:
        del keyword_only_inputs
        ctx.save_for_backward(*output[-len(positions) :])
        ctx.count = len(inputs)
        ctx.kinds = [_kind(inputs[position]) for position in positions]

    return setup_context


def _kind(tensor: Tensor | None) -> tuple[torch.dtype, torch.Size] | None:
    return None if tensor is None else (tensor.dtype, tensor.shape)


def _backward(positions: tuple[int, ...]) -> Callable[..., Any]:
    def backward(ctx: Any, upstream: Tensor, *others: Tensor | None) -> Any:
        del others
        refuse_second_derivative()
        gradients: list[Tensor | None] = [None] * ctx.count
        for position, kind, formed in zip(positions, ctx.kinds, ctx.saved_tensors, strict=True):
            if kind is not None and formed.shape == kind[1]:
                gradients[position] = _scaled(formed, upstream, kind[0])
        return tuple(gradients)

    return backward


def _scaled(formed: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product, computed in the wider dtype and cast without an intermediate copy."""
    out = torch.empty_like(formed, dtype=dtype)
    return torch.mul(formed, upstream, out=out)
