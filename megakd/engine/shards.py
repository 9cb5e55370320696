"""This rank's part of each weight and of its gradient, at every ZeRO stage.

Also weights that are NaN or infinite, which are found shard by shard.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def local_shards(model: nn.Module, *, loss_scale: float = 1.0) -> Iterator[Shard]:
    """Yield this rank's shards between the last backward of a step and the update.

    Frozen weights and weights without a gradient are left out. The engine has multiplied the loss
    by `loss_scale` under fp16.
    """
    for name, parameter in model.named_parameters():
        shard = _shard_of(parameter) if parameter.requires_grad else None
        if shard is not None:
            weight, gradient, offset = shard
            yield Shard(name, weight, gradient.float() / loss_scale, offset)


def _shard_of(parameter: Any) -> tuple[Tensor, Tensor, int] | None:
    if hasattr(parameter, "ds_id"):  # ZeRO 3
        return _of_partition(parameter)
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2, and bf16 at ZeRO 0
        return _of_fragment(parameter)
    return _of_whole(parameter)


def _of_partition(parameter: Any) -> tuple[Tensor, Tensor, int] | None:
    optimizer = parameter._z3_optimizer  # noqa: SLF001 - as deepspeed.utils does
    weight = optimizer.get_local_fp32_param(parameter).flatten()
    gradient = optimizer.get_local_fp32_grad_for_param(parameter).flatten()
    offset, count = own_partition(parameter, len(weight))
    return weight[:count], gradient[:count], offset


def _of_fragment(parameter: Any) -> tuple[Tensor, Tensor, int] | None:
    mapping = parameter._hp_mapping  # noqa: SLF001 - as deepspeed.utils does
    if mapping is None:  # this rank holds no part of the weight
        return None
    place = mapping.lp_fragment_address
    number = parameter._index_in_param_group  # noqa: SLF001
    gradient = mapping.get_lp_grad_fragment(number).flatten()
    if len(gradient) != place.numel:  # bf16 at ZeRO 0 accumulates whole gradients
        gradient = gradient[place.start : place.start + place.numel]
    return mapping.get_hp_fragment().flatten(), gradient, place.start


def _of_whole(parameter: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """Return a part of a weight that every rank holds whole, so that ranks do not overlap."""
    if parameter.grad is None:
        return None
    part = own_part(parameter)
    weight, gradient = parameter.detach().flatten(), parameter.grad.flatten()
    return weight[part].float(), gradient[part], part.start


def own_part(parameter: Tensor) -> slice:
    """Return this rank's share of a flattened weight that every rank holds whole."""
    size = -(-parameter.numel() // dist.get_world_size())
    first = min(dist.get_rank() * size, parameter.numel())
    return slice(first, min(first + size, parameter.numel()))


def own_partition(parameter: Any, size: int) -> tuple[int, int]:
    """Return the offset and the length of this rank's part of a weight that ZeRO 3 has split.

    Every rank holds `size` elements; the last ranks hold padding.
    """
    offset = dist.get_rank() * size
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
    rank = torch.distributed.get_rank(parameter.ds_process_group)  # pyright: ignore[reportAttributeAccessIssue]
    left = parameter.ds_numel - rank * shard.numel()  # pyright: ignore[reportAttributeAccessIssue]
    return shard.detach()[: max(0, min(left, shard.numel()))]
