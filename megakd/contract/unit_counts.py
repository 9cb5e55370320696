"""Numbers of units in a step, by which sums of loss terms are divided, and sources of texts."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from megakd.contract.batch import IGNORE, Batch, Counts, Unit

if TYPE_CHECKING:
    from torch import Tensor

Source = Literal["rollouts", "data"]
"""Source of a text: a model that generated it during the run, or the data."""
UnitCounter = Callable[[Batch], "Tensor"]
"""Function from a rank's micro-batch to an int64 scalar on its device, without a host sync."""


def on_source(name: str, source: Source | None) -> str:
    """Return the name of a value that is limited to a source; None: the name itself.

    The name has no slash, which separates the name from the view in logs.
    """
    return name if source is None else f"{name}_on_{source}"


def without_source(name: str) -> str:
    """Return the name of a value without the source that `on_source` added."""
    return functools.reduce(str.removesuffix, (on_source("", s) for s in get_args(Source)), name)


def is_of(source: Source | None, batch: Batch) -> bool:
    """Return whether the texts of a micro-batch are of a source; None: of any."""
    return source is None or batch.extras.is_rollout == (source == "rollouts")


def second_targets(batch: Batch) -> Batch | None:
    """Return the targets in the second vocabulary as a batch that predicts all its positions.

    The result is None if a batch has no such targets.
    """
    if batch.extras.second is None:
        return None
    labels = batch.extras.second.labels
    return batch._replace(labels=labels, targets=None).extended(second=None)


def _targets(batch: Batch) -> Tensor:
    labels = batch.labels
    count = (~labels.isnan() if labels.is_floating_point() else labels != IGNORE).sum()
    second = batch.extras.second
    return count if second is None else count + (second.labels != IGNORE).sum()


def _targets_on(source: Source, batch: Batch) -> Tensor:
    return (batch.labels != IGNORE).sum() * is_of(source, batch)


COUNTERS: Mapping[Unit, UnitCounter] = MappingProxyType(
    {
        "examples": lambda batch: batch.valid.any(dim=1).sum(),
        "targets": _targets,
        "tokens": lambda batch: batch.valid.sum(),
    }
)
"""The units of every run. A loss group may declare more in its `counters`."""
SOURCE_UNITS: Mapping[Source, Unit] = MappingProxyType(
    {"rollouts": "rollout_targets", "data": "data_targets"}
)


def source_counters(source: Source | None) -> Mapping[Unit, UnitCounter]:
    """Return the counter of the labelled positions of a source; none without: `COUNTERS` has it."""
    return {} if source is None else {SOURCE_UNITS[source]: functools.partial(_targets_on, source)}


def count_units(
    batches: Sequence[Batch], counters: Mapping[Unit, UnitCounter] = COUNTERS
) -> Counts:
    """Return int64 scalars by unit: the sums over the micro-batches of one rank in a step."""
    return {
        unit: functools.reduce(operator.add, map(count, batches))
        for unit, count in counters.items()
    }
