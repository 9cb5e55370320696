"""Detection of weights that are NaN or infinite, shard by shard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.zero.partition_parameters import is_zero_param

from megakd.engine.collectives import gather

if TYPE_CHECKING:
    from torch import Tensor, nn


def names_of_bad_weights(module: nn.Module) -> list[str]:
    """Return the names of parameters that are not finite on any rank; a collective.

    The result is the same on every rank. Costs one pass over this rank's weights and one device
    sync.
    """
    named = [(name, _own_part(parameter)) for name, parameter in module.named_parameters()]
    named = [(name, part) for name, part in named if part.numel()]
    finite = torch.stack([_is_finite(part) for _, part in named]).tolist() if named else []
    bad = [name for (name, _), fine in zip(named, finite, strict=True) if not fine]
    return list(dict.fromkeys(name for found in gather(bad) for name in found))


def _own_part(parameter: Tensor) -> Tensor:
    if not is_zero_param(parameter):
        return parameter.detach()
    shard = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
    rank = torch.distributed.get_rank(parameter.ds_process_group)  # pyright: ignore[reportAttributeAccessIssue]
    left = parameter.ds_numel - rank * shard.numel()  # pyright: ignore[reportAttributeAccessIssue]
    return shard.detach()[: max(0, min(left, shard.numel()))]


def _is_finite(part: Tensor) -> Tensor:
    """Return a bool scalar; minimum and maximum need no memory, unlike `isfinite` of all values."""
    low, high = torch.aminmax(part)
    return torch.isfinite(low) & torch.isfinite(high)
