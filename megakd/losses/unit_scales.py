"""Factors of the sums of loss terms over the units of a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megakd.contract.batch import Counts, Unit


class UnitScales(NamedTuple):
    """Factors of sums over a step, fp32 scalars by unit.

    divisors: the unit's count, at least one.
    weights: world size / divisor; the world size cancels DeepSpeed's averaging of gradients over
        the ranks.
    """

    divisors: dict[Unit, Tensor]
    weights: dict[Unit, Tensor]


def unit_scales(counts: Counts, world_size: int) -> UnitScales:
    """Return the factors of each unit of a step, from the counts of all ranks."""
    # Together, because beside a small loss an operation on a scalar takes long.
    divisors = torch.stack([*counts.values()]).clamp(min=1).float()
    both = (divisors, world_size / divisors)
    return UnitScales(*(dict(zip(counts, values.unbind(), strict=True)) for values in both))
