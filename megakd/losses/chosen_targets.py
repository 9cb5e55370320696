"""The target positions of a batch that a group of terms is limited to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megakd.contract.batch import IGNORE, Batch
from megakd.contract.moving import copied_to
from megakd.contract.sources import Source, of_source


class Chosen(NamedTuple):
    """Some of the N target positions of a batch.

    labels: [n], or shaped like `batch.target_labels` if all positions are kept.
    positions: [n] int64 numbers of the kept positions; None: all positions are kept.
    """

    labels: Tensor
    positions: Tensor | None

    def of(self, values: Tensor) -> Tensor:
        """Return the kept rows [n, D] of [N, D] or [B, T, D] values; all rows as they are."""
        return values if self.positions is None else values.flatten(0, -2)[self.positions]


def chosen_targets(batch: Batch, source: Source | None) -> Chosen:
    """Return the targets of a source, without a host sync; None: all targets.

    If the host knows the sources, only rows of the source are kept, so that products with the
    output matrix run over these rows. Otherwise the labels of other rows become -100. At least one
    row is kept, so that a step without targets has a backward through the same operations.
    """
    labels = batch.target_labels
    if source is None:
        return Chosen(labels, None)
    own = of_source(batch, source)
    if not own.is_cpu:
        return Chosen(labels.masked_fill(~own, IGNORE), None)
    if own.all():
        return Chosen(labels, None)
    kept = own.flatten().nonzero().squeeze(1)
    if not len(kept):
        first = torch.zeros(1, dtype=torch.long, device=labels.device)
        return Chosen(torch.full_like(first, IGNORE), first)
    kept = copied_to(kept, labels.device)
    return Chosen(labels.flatten()[kept], kept)
