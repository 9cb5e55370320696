"""This rank's part of each gradient, and where a weight is divided, at every ZeRO stage.

Also weights that are NaN or infinite, which are found shard by shard.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from torch import Tensor, nn

from megakd.engine.collectives import gather


class Shard(NamedTuple):
    """A part of a flattened weight.

    The shards of all ranks cover every weight once, so that a sum over the shards of all ranks is
    a sum over the weight.

    name: name of the weight in its model.
    weight: [n] fp32; the values that the optimizer updates.
    gradient: [n] fp32; the gradient of the whole step, over all ranks and micro-batches, before
        clipping.
    offset: index of the first element in the flattened weight.
    """

    name: str
    weight: Tensor
    gradient: Tensor
    offset: int


def own_gradient(parameter: Any, offset: int, size: int) -> Tensor | None:
    """Return this rank's part [size] of a weight's gradient; None if it has none."""
    if is_zero_param(parameter):
        optimizer = parameter._z3_optimizer  # noqa: SLF001 - as deepspeed.utils does
        return optimizer.get_local_fp32_grad_for_param(parameter).flatten()[:size]
    if not hasattr(parameter, "_hp_mapping"):  # every rank holds the whole weight
        gradient = parameter.grad
    elif parameter._hp_mapping is None:  # noqa: SLF001 - this rank holds no part of the weight
        return None
    else:  # ZeRO 1 and 2, and bf16 at ZeRO 0, which accumulates whole gradients
        number = parameter._index_in_param_group  # noqa: SLF001
        gradient = parameter._hp_mapping.get_lp_grad_fragment(number)  # noqa: SLF001
    if gradient is None or gradient.numel() == size:
        return gradient
    return gradient.flatten()[offset : offset + size]


def own_part(parameter: Tensor) -> slice:
    """Return this rank's share of a flattened weight that every rank holds whole."""
    size = -(-parameter.numel() // dist.get_world_size())
    first = min(dist.get_rank() * size, parameter.numel())
    return slice(first, min(first + size, parameter.numel()))


def own_partition(parameter: Any, size: int) -> tuple[int, int]:
    """Return the offset and the length of this rank's part of a weight that ZeRO 3 has split.

    Every rank holds `size` elements; the last ranks hold padding.
    """
    offset = dist.get_rank(parameter.ds_process_group) * size
    return offset, max(0, min(size, parameter.ds_numel - offset))


def names_of_bad_weights(module: nn.Module) -> list[str]:
    """Return the names of parameters that are not finite on any rank; a collective.

    The result is the same on every rank. Costs one pass over this rank's weights and one device
    sync.
    """
    named = [(name, _own_part(parameter)) for name, parameter in module.named_parameters()]
    named = [(name, part) for name, part in named if part.numel()]
    # Minimum and maximum need no memory, unlike `isfinite` of all values.
    ends = [torch.stack(torch.aminmax(part)).isfinite().all() for _, part in named]
    finite = torch.stack(ends).tolist() if named else []
    bad = [name for (name, _), fine in zip(named, finite, strict=True) if not fine]
    return list(dict.fromkeys(name for names in gather(bad) for name in names))


def _own_part(parameter: Tensor) -> Tensor:
    if not is_zero_param(parameter):
        return parameter.detach()
    shard = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return shard.detach()[: own_partition(parameter, shard.numel())[1]]
