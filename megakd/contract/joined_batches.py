"""The micro-batches of a step as one batch, and the outputs for it cut back into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megakd.contract.batch import IGNORE, Batch, Documents, Knowledge


def joined(batches: Sequence[Batch]) -> Batch:
    """Return the rows of all micro-batches of a task, padded to the longest row.

    The rows have no numbers and no `extras`: frozen models, which answer, have one vocabulary.
    """
    length = max(batch.valid.shape[1] for batch in batches)
    return Batch(
        inputs={
            name: torch.cat([_longer(name, batch.inputs[name], length) for batch in batches])
            for name in batches[0].inputs
        },
        labels=torch.cat([_longer("labels", batch.labels, length) for batch in batches]),
        valid=torch.cat([_longer("valid", batch.valid, length) for batch in batches]),
        targets=_targets(batches, length),
        documents=_documents(batches, length),
    )


def _longer(name: str, values: Tensor, length: int) -> Tensor:
    # [B, length]; padding is a document of its own, and no target.
    # Labels by class are no positions.
    is_text = values.dim() > 1 and not values.is_floating_point()
    more = length - values.shape[1] if is_text else 0
    if more == 0:
        return values
    if name == "position_ids":
        positions = torch.arange(more, device=values.device).expand(len(values), more)
        return torch.cat([values, positions], dim=1)
    return functional.pad(values, (0, more), value=IGNORE if name == "labels" else 0)


def _targets(batches: Sequence[Batch], length: int) -> Tensor | None:
    moved, first = [], 0
    for batch in batches:
        if batch.targets is None:
            return None
        rows, shorter = batch.valid.shape
        moved.append(_moved(batch.targets, shorter, length) + first * length)
        first += rows
    return torch.cat(moved)


def _moved(positions: Tensor, shorter: int, length: int) -> Tensor:
    return positions + positions.div(shorter, rounding_mode="floor") * (length - shorter)


def _documents(batches: Sequence[Batch], length: int) -> Documents | None:
    starts, longest, first = [], 0, 0
    for batch in batches:
        if batch.documents is None:
            return None
        rows, shorter = batch.valid.shape
        document_starts = batch.documents.starts[:-1]
        starts.append(_moved(document_starts, shorter, length) + first * length)
        if shorter < length:  # the added positions of each row
            numbers = torch.arange(rows, device=document_starts.device, dtype=document_starts.dtype)
            starts.append((numbers + first) * length + shorter)
        longest = max(longest, batch.documents.longest, length - shorter)
        first += rows
    end = torch.full((1,), first * length, device=starts[0].device, dtype=starts[0].dtype)
    return Documents(torch.cat([*starts, end]).sort().values, longest)


def split(outputs: Knowledge, batches: Sequence[Batch]) -> Iterator[Knowledge]:
    """Yield the outputs for each micro-batch of `joined(batches)`, without a copy."""
    row = target = 0
    for batch in batches:
        rows, length = batch.valid.shape
        targets = 0 if batch.targets is None else len(batch.targets)
        yield _part(outputs, slice(row, row + rows), length, slice(target, target + targets))
        row, target = row + rows, target + targets


def _part(outputs: Knowledge, rows: slice, length: int, targets: slice) -> Knowledge:
    def cut(values: Tensor) -> Tensor:
        return values[rows, :length]

    def hidden(values: Tensor) -> Tensor:  # [N, D] at the targets, or [B, T, D]
        return values[targets] if values.dim() == 2 else cut(values)

    return outputs.mapped(lambda logits: logits[rows], hidden, cut)
