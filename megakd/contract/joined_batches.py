"""Several micro-batches as one batch, and the outputs for it cut back into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megakd.contract.batch import IGNORE, Batch, Documents, Extras, Knowledge, Targets


class Part(NamedTuple):
    """The place of a micro-batch in the joined batch.

    rows: its rows.
    length: its positions per row; the joined batch may have more.
    targets, second: its predicted positions from the first and the second vocabulary.
    """

    rows: slice
    length: int
    targets: slice
    second: slice


def joined(batches: Sequence[Batch]) -> Batch:
    """Return the rows of all micro-batches of a task, padded to the longest row.

    The rows have no numbers, and of `extras` only `second`: the others belong to the micro-batches,
    and the models that answer do not read them.
    """
    length = max(batch.valid.shape[1] for batch in batches)
    return Batch(
        inputs={
            name: torch.cat([_longer(name, batch.inputs[name], length) for batch in batches])
            for name in batches[0].inputs
        },
        labels=torch.cat([_longer("labels", batch.labels, length) for batch in batches]),
        valid=torch.cat([_longer("valid", batch.valid, length) for batch in batches]),
        targets=_targets([batch.targets for batch in batches], batches, length),
        extras=Extras(second=_second(batches, length)),
        documents=_documents(batches, length),
    )


def _longer(name: str, values: Tensor, length: int) -> Tensor:
    # [B, length]; padding is a document of its own, and no target.
    more = length - values.shape[1] if values.dim() > 1 else 0
    if more == 0:
        return values
    if name == "position_ids":
        positions = torch.arange(more, device=values.device).expand(len(values), more)
        return torch.cat([values, positions], dim=1)
    return functional.pad(values, (0, more), value=IGNORE if name == "labels" else 0)


def _targets(
    targets: Sequence[Tensor | None], batches: Sequence[Batch], length: int
) -> Tensor | None:
    moved, first = [], 0
    for numbers, batch in zip(targets, batches, strict=True):
        if numbers is None:
            return None
        rows, shorter = batch.valid.shape
        moved.append(_moved(numbers, shorter, length) + first * length)
        first += rows
    return torch.cat(moved)


def _moved(positions: Tensor, shorter: int, length: int) -> Tensor:
    return positions + positions.div(shorter, rounding_mode="floor") * (length - shorter)


def _second(batches: Sequence[Batch], length: int) -> Targets | None:
    known = [b.extras.second for b in batches if b.extras.second is not None]
    if len(known) < len(batches):
        return None
    positions = _targets([second.positions for second in known], batches, length)
    labels = torch.cat([second.labels for second in known])
    return None if positions is None else Targets(positions, labels)


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


def parts_of(batches: Sequence[Batch]) -> Iterator[Part]:
    """Yield the places of the micro-batches in `joined(batches)`."""
    row = target = second = 0
    for batch in batches:
        rows, length = batch.valid.shape
        targets = 0 if batch.targets is None else len(batch.targets)
        second_targets = batch.extras.second
        others = 0 if second_targets is None else len(second_targets.positions)
        yield Part(
            slice(row, row + rows),
            length,
            slice(target, target + targets),
            slice(second, second + others),
        )
        row, target, second = row + rows, target + targets, second + others


def part_of(outputs: Knowledge, part: Part) -> Knowledge:
    """Return the outputs for one micro-batch of a joined batch, without a copy."""

    def cut(values: Tensor) -> Tensor:
        return values[part.rows, : part.length]

    def hidden(values: Tensor) -> Tensor:  # [N, D] at the targets, or [B, T, D]
        return values[part.targets] if values.dim() == 2 else cut(values)

    second = outputs.second
    if second is not None and second.hidden is not None:
        second = second._replace(hidden=second.hidden[part.second])
    return outputs.mapped(lambda logits: logits[part.rows], hidden, cut)._replace(second=second)
