"""The relation loss as operators that torch.compile does not split, with their derivatives.

`relation_kl` processes tiles in torch and forms its gradients in the forward.
`relation_kl_flash` runs the Triton kernels and saves row statistics, from which
`relation_kl_flash_backward` forms the gradients. Tensor arguments are the fields of `Relation`,
in the same order.
Shapes: B batch, L positions, D width (Ds student), A relation heads.
"""

from typing import Any

import torch
from torch import Tensor

from megakd_kernels.formed import refuse_second_derivative, register_formed_gradients
from megakd_kernels.relation_chunked import relation_sweep
from megakd_kernels.relation_reference import Relation

_STATISTICS = 4
# The fields of `Relation`, and the gradients that are requested, as operators take them.
_RELATION = (
    "Tensor student_queries, Tensor? student_keys, Tensor teacher_queries, Tensor? teacher_keys, "
    "Tensor? valid, Tensor? segments, Tensor weight, *, SymInt heads, bool causal"
)
_WANTED = "bool wants_queries, bool wants_keys"


@torch.library.custom_op(
    "megakd::relation_kl",
    mutates_args=(),
    schema=f"({_RELATION}, {_WANTED}) -> (Tensor, Tensor, Tensor)",
)
def relation_kl(
    *tensors: Any, heads: int, causal: bool, wants_queries: bool, wants_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of `relation_sweep`."""
    relation = Relation(*tensors, heads=heads, causal=causal)
    with torch.autocast(relation.weight.device.type, enabled=False):
        return relation_sweep(relation, wants_queries=wants_queries, wants_keys=wants_keys)


@torch.library.custom_op(
    "megakd::relation_kl_flash", mutates_args=(), schema=f"({_RELATION}) -> (Tensor, Tensor)"
)
def relation_kl_flash(*tensors: Any, heads: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the scalar loss and statistics [4, B, A, L] for the backward."""
    from megakd_kernels.triton import relation_flash

    return relation_flash.forward(Relation(*tensors, heads=heads, causal=causal))


@torch.library.custom_op(
    "megakd::relation_kl_flash_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor statistics, {_RELATION}, {_WANTED}) -> (Tensor, Tensor)",
)
def relation_kl_flash_backward(
    upstream: Tensor, statistics: Tensor, *tensors: Any, heads: int, causal: bool, **wanted: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries and keys, times `upstream`, in the inputs' dtype.

    A gradient that is not requested is empty.
    """
    from megakd_kernels.triton import relation_flash

    relation = Relation(*tensors, heads=heads, causal=causal)
    return relation_flash.backward(upstream, statistics, relation, **wanted)


@relation_kl.register_fake
def _fake(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    queries, weight = tensors[0], tensors[6]
    return weight.new_empty(()), *_gradients_like(queries, weight.dtype, options)


@relation_kl_flash.register_fake
def _flash_fake(*tensors: Tensor, heads: int, **_: Any) -> tuple[Tensor, Tensor]:
    weight = tensors[6]
    batch, length = weight.shape
    return weight.new_empty(()), weight.new_empty(_STATISTICS, batch, heads, length)


@relation_kl_flash_backward.register_fake
def _flash_backward_fake(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    queries = tensors[2]
    return _gradients_like(queries, queries.dtype, options)


def _gradients_like(
    queries: Tensor, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    shapes = (queries.shape if options[name] else 0 for name in ("wants_queries", "wants_keys"))
    first, second = (queries.new_empty(shape, dtype=dtype) for shape in shapes)
    return first, second


def _keep_inputs(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.options = keyword_only_inputs


def _run_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    wants_queries, wants_keys = ctx.needs_input_grad[:2]
    queries, keys = relation_kl_flash_backward(
        upstream, *ctx.saved_tensors, **ctx.options,
        wants_queries=wants_queries, wants_keys=wants_keys,
    )  # fmt: skip
    return queries if wants_queries else None, keys if wants_keys else None, *(None,) * 5


register_formed_gradients(relation_kl, (0, 1))
relation_kl_flash.register_autograd(_run_backward, setup_context=_keep_inputs)
