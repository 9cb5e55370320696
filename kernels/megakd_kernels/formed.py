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
from torch.nn import Parameter
from torch.utils import _python_dispatch

_POSITIONS: dict[Any, tuple[int, ...]] = {}


def register_formed_gradients(operator: Any, positions: Sequence[int]) -> None:
    """Register the backward of `operator`.

    Args:
        operator: a `torch.library.custom_op`; its first output is the total, its last
            len(positions) outputs are the formed gradients.
        positions: positions of the arguments that the gradients belong to, in output order.
    """
    _POSITIONS[operator] = tuple(positions)
    operator.register_autograd(_backward(tuple(positions)), setup_context=_saver(tuple(positions)))


def run(operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the outputs of a registered operator, with its gradient.

    The function of the operator is called directly where nothing looks at the operator: the
    dispatch of an operator written in Python takes 0.15 ms, longer than a small loss. Graphs,
    fake tensors and dispatch modes get the operator.
    """
    if operator in _POSITIONS and _is_plain(arguments):
        return _Formed.apply(operator, *arguments)
    return operator(*arguments)


class _Formed(torch.autograd.Function):
    """The operator without its dispatch."""

    @staticmethod
    def forward(ctx: Any, operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = operator._init_fn(*arguments)  # noqa: SLF001, the function of the operator
        ctx.mark_non_differentiable(*output[1:])
        _saver(_POSITIONS[operator])(ctx, arguments, output)
        ctx.operator = operator
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, *_backward(_POSITIONS[ctx.operator])(ctx, *upstream)


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Return whether the arguments are real tensors that no mode or transform watches."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():  # noqa: SLF001
        return False
    if _python_dispatch._get_current_dispatch_mode() is not None:  # noqa: SLF001
        return False
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    return all(type(each) in {Tensor, Parameter} and not each.is_meta for each in tensors)


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
        # Else autograd would form zeros as large as the gradients, for unused outputs.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[-len(positions) :])
        ctx.count = len(inputs)
        ctx.kinds = [_kind(inputs[position]) for position in positions]

    return setup_context


def _kind(tensor: Tensor | None) -> tuple[torch.dtype, torch.Size] | None:
    return None if tensor is None else (tensor.dtype, tensor.shape)


def _backward(positions: tuple[int, ...]) -> Callable[..., Any]:
    def backward(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> Any:
        del others
        refuse_second_derivative()
        gradients: list[Tensor | None] = [None] * ctx.count
        if upstream is None:
            return tuple(gradients)
        for position, kind, formed in zip(positions, ctx.kinds, ctx.saved_tensors, strict=True):
            if kind is not None and formed.shape == kind[1]:
                gradients[position] = _scaled(formed, upstream, kind[0])
        return tuple(gradients)

    return backward


def _scaled(formed: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product, computed in the wider dtype and cast without an intermediate copy."""
    out = torch.empty_like(formed, dtype=dtype)
    # A scalar tensor would be rounded to the dtype of narrower gradients first.
    factor = upstream if formed.dtype == upstream.dtype else upstream.reshape(1)
    return torch.mul(formed, factor, out=out)
