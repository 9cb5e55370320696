"""Sources of the texts of a batch: the data, and texts that a model generated during the run."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, get_args

from megakd.contract.batch import copied_to

if TYPE_CHECKING:
    from torch import Tensor

    from megakd.contract.batch import Batch

Source = Literal["rollouts", "data"]


def on_source(name: str, source: Source | None) -> str:
    """Return the name of a value that is limited to a source; None: the name itself.

    The name has no slash, which separates the name from the view in logs.
    """
    return name if source is None else f"{name}_on_{source}"


def without_source(name: str) -> str:
    """Return the name of a value without the source that `on_source` added."""
    return functools.reduce(str.removesuffix, (on_source("", s) for s in get_args(Source)), name)


def of_source(batch: Batch, source: Source) -> Tensor:
    """Return bool, shaped like `batch.target_labels`: True at positions of a source.

    The result is on the CPU, as `is_rollout` is, and on the batch's device only if the batch has
    `targets`. Without `is_rollout`, all positions are data.
    """
    rollouts = batch.extras.is_rollout
    if rollouts is None:
        rollouts = batch.valid.new_zeros(batch.labels.shape, device="cpu")
    if batch.targets is not None:
        rollouts = copied_to(rollouts, batch.targets.device).flatten()[batch.targets]
    return rollouts if source == "rollouts" else ~rollouts


def second_targets(batch: Batch) -> Batch | None:
    """Return the targets in the second vocabulary as a batch that predicts all its positions.

    The result is None if a batch has no such targets.
    """
    if batch.extras.second is None:
        return None
    positions, labels = batch.extras.second
    rollouts = batch.extras.is_rollout
    if rollouts is not None:
        rollouts = copied_to(rollouts, positions.device).flatten()[positions]
    chosen = batch._replace(labels=labels, targets=None)
    return chosen.extended(second=None, is_rollout=rollouts)
