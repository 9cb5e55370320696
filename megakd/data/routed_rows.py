"""Micro-batches with the rows of each teacher as a part, for rows that name their teachers.

Shapes: B rows of a micro-batch, T positions; b rows and t positions of a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megakd.contract.batch import IGNORE, Batch, Within
from megakd.data.collation import documents_of, padded_width


def with_parts(batch: Batch, numbers: Mapping[str, int]) -> Batch:
    """Return a micro-batch with the part of every teacher in `others`.

    The part of a teacher has the positions of the rows that name this teacher. A teacher without
    rows has a part with a blank row, so that all ranks ask the same teachers. The batch is on the
    CPU; without `routes`, no position is valid.
    """
    if batch.extras.second is not None or batch.extras.others:
        raise TypeError("rows that name their teachers cannot be read with a second vocabulary")
    routes = None if batch.extras.routes is None else batch.extras.routes.numpy()
    whole = batch.extended(routes=None)
    parts = {
        name: _part(whole, np.zeros(batch.valid.shape, bool) if routes is None else routes == one)
        for name, one in numbers.items()
    }
    return whole.extended(others=parts)


class _Places(NamedTuple):
    """Places of the rows of a part.

    rows: [b] rows of the micro-batch, at least one.
    positions: [b, t] positions of the flattened micro-batch, each row's own positions first.
    valid: [b, t] whether a position belongs to the part; others fill the row.
    """

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    valid: NDArray[np.bool_]


def _places(mask: NDArray[np.bool_]) -> _Places:
    # A part without positions has one blank row.
    rows = np.flatnonzero(mask.any(axis=1)) if mask.any() else np.zeros(1, dtype=np.int64)
    mine = mask[rows]  # [b, T]
    width = padded_width(int(mine.sum(axis=1).max()), mask.shape[1])
    # In a row of one teacher, the positions after the text are the padding of the row.
    order = np.argsort(~mine, axis=1, kind="stable")[:, :width]
    positions = rows[:, None] * mask.shape[1] + order
    return _Places(rows, positions, np.take_along_axis(mine, order, axis=1))


def _part(batch: Batch, mask: NDArray[np.bool_]) -> Batch:
    places = _places(mask)
    positions, valid = torch.from_numpy(places.positions), torch.from_numpy(places.valid)
    rows = torch.from_numpy(places.rows)

    def at(values: torch.Tensor) -> torch.Tensor:
        return values.flatten()[positions]

    targets, numbers = _targets(batch, places, mask)
    part = Batch(
        {name: at(values) for name, values in batch.inputs.items()},
        _labels(batch, rows, positions, valid=valid),
        valid,
        targets=targets,
        # -1: a blank row.
        rows=None if batch.rows is None else batch.rows[rows].masked_fill(~valid.any(dim=1), -1),
        extras=batch.extras.of_rows(lambda values: at(values) * valid)._replace(
            within=Within(rows, positions, numbers)
        ),
    )
    return part if batch.documents is None else _with_documents(part)


def _labels(
    batch: Batch, rows: torch.Tensor, positions: torch.Tensor, *, valid: torch.Tensor
) -> torch.Tensor:
    if batch.labels.dim() == 2:
        return batch.labels.flatten()[positions].masked_fill(~valid, IGNORE)
    none = float("nan") if batch.labels.is_floating_point() else IGNORE
    return batch.labels[rows].masked_fill(~valid.any(dim=1), none)


def _targets(
    batch: Batch, places: _Places, mask: NDArray[np.bool_]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    # Both are None if all positions are predicted. Without a predicted position in the part, the
    # first position stands for it, which has no label there.
    if batch.targets is None:
        return None, None
    targets = batch.targets.numpy()
    numbers = np.flatnonzero(mask.ravel()[targets])
    place = np.zeros(mask.size, dtype=np.int64)
    flat = places.positions.ravel()[places.valid.ravel()]
    place[flat] = np.flatnonzero(places.valid.ravel())
    if not len(numbers):
        blank = torch.zeros(1, dtype=torch.long)
        return blank, blank
    return torch.from_numpy(place[targets[numbers]]), torch.from_numpy(numbers)


def _with_documents(part: Batch) -> Batch:
    # The positions that fill a row are one document.
    ids = part.inputs["position_ids"]
    before = part.valid.sum(dim=1, keepdim=True)
    filled = torch.arange(ids.shape[1]) - before
    positions = torch.where(part.valid, ids, filled)
    inputs = {**part.inputs, "position_ids": positions}
    return part._replace(inputs=inputs, documents=documents_of(positions.numpy()))
