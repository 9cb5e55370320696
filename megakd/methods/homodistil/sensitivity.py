"""Scores of units, from this rank's shards of the weights and of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.contract.views import Columns, Cut, Kind, Maker, View
from megakd.methods.homodistil.schedule import Scoring

SENSITIVITY, UNCERTAINTY = "sensitivity", "uncertainty"
Averages = dict[str, dict[str, Tensor]]
"""By kind of average, and by name of the weight: [n] fp32 for this rank's elements."""


class Group(NamedTuple):
    """Units that are ranked together: those of one attention, one feed-forward, or the width.

    columns: the columns inside the heads of an attention; None for whole units.
    """

    kind: Kind
    number: int
    columns: Columns | None


def update_averages(averages: Averages, shard: Any, scoring: Scoring) -> None:
    """Add the sensitivities of a step to exponential averages, in place.

    The sensitivity of a weight is |weight * gradient|, the first-order estimate of the change of
    the loss without the weight. Its average is beta * average + (1 - beta) * sensitivity. The
    uncertainty is the average of |sensitivity - average| (PLATON, Zhang et al. 2022, equation 7).
    """
    value = (shard.weight.detach() * shard.gradient).abs_()
    average = _like(value, averages.setdefault(SENSITIVITY, {}), shard.name)
    # Under fp16 a step may overflow; its update is skipped, and an infinite value would stay.
    value.nan_to_num_(nan=0.0, posinf=0.0)
    average.lerp_(value, 1 - scoring.sensitivity_beta)
    if scoring.score == "platon":
        spread = _like(value, averages.setdefault(UNCERTAINTY, {}), shard.name)
        spread.lerp_(value.sub_(average).abs_(), 1 - scoring.uncertainty_beta)


def _like(value: Tensor, averages: dict[str, Tensor], name: str) -> Tensor:
    """Return the average of a weight, on the device of its gradient; zero at the start."""
    known = averages.get(name)
    averages[name] = torch.zeros_like(value) if known is None else known.to(value.device)
    return averages[name]


def group_sizes(makers: Mapping[str, Maker], units: View) -> dict[Group, int]:
    """Return the number of scores of every group, in a fixed order."""
    sizes: dict[Group, int] = {}
    for maker in makers.values():
        axis = maker.axis
        group = Group(axis.kind, axis.number, axis.columns)
        sizes[group] = (axis.kept(units) or 0) * (axis.size if axis.columns else 1)
    return sizes


def unit_sums(
    values: Mapping[str, tuple[Tensor, int]], makers: Mapping[str, Maker], units: View, cut: Cut
) -> Tensor:
    """Return the L1 scores of all groups side by side, fp64, of this rank's elements.

    The score of a unit is the sum over the weights that produce the unit, except for weights whose
    input is removed. The sum over all ranks is the score of the whole model. The values [n] of this
    rank stand by name of the weight, with their offset in the weight.
    """
    sizes = group_sizes(makers, units)
    sums = {group: torch.zeros(size, dtype=torch.float64) for group, size in sizes.items()}
    for name, maker in makers.items():
        if name not in values:
            continue
        axis = maker.axis
        lines = line_sums(*values[name], maker, cut).view(axis.parts, -1).sum(0)
        if not axis.columns:
            lines = lines.view(-1, axis.size).sum(1)
        sums[Group(axis.kind, axis.number, axis.columns)] += lines
    return torch.cat(list(sums.values()))


def line_sums(values: Tensor, offset: int, maker: Maker, cut: Cut) -> Tensor:
    """Return the sums of absolute values over a part of a matrix, fp64, per row or column.

    The values [n] are consecutive elements of the flattened matrix, from `offset` on; only values
    with kept inputs count.
    """
    columns, dimension = maker.shape[1], maker.dimension
    first, before = divmod(offset, columns)
    count = -(-(before + len(values)) // columns)
    lines = values.new_zeros(count * columns)
    lines[before : before + len(values)] = values.abs()
    grid, kept = lines.view(count, columns), _kept_inputs(maker, cut).to(values.device)
    sums = torch.zeros(maker.shape[dimension], dtype=torch.float64)
    if dimension == 0:
        sums[first : first + count] = (grid * kept).sum(1, dtype=torch.float64).cpu()
    else:
        sums += (grid * kept[first : first + count, None]).sum(0, dtype=torch.float64).cpu()
    return sums


def _kept_inputs(maker: Maker, cut: Cut) -> Tensor:
    """Return 1 for every kept input of a matrix and 0 for every other, [inputs]."""
    length = maker.shape[1 - maker.dimension]
    if maker.inputs is None:
        return torch.ones(length)
    kept = torch.zeros(length)
    kept[maker.inputs.rows(cut, length)] = 1
    return kept
