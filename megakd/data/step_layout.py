"""Micro-batches of an optimizer step: by number of rows, or packed by a token budget.

Shapes: B rows of a micro-batch, T positions.
"""

from __future__ import annotations

import heapq
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from megakd.contract.batch import IGNORE, Batch, teacher_number
from megakd.data.collation import Collator, documents_of, padded_width
from megakd.errors import DataError


class StepShape(NamedTuple):
    """Numbers of rows, micro-batches and ranks of an optimizer step.

    per_device: rows of a micro-batch.
    accumulation: micro-batches of a rank per step.
    """

    per_device: int
    accumulation: int
    rank: int = 0
    world: int = 1

    @staticmethod
    def of_batch(batch_size: int, most: int, *, rank: int, world: int) -> StepShape:
        """Return the shape that splits a global batch evenly into micro-batches.

        They have at most `most` rows, of which the last may be a dummy row.
        """
        accumulation = -(-batch_size // (most * world))
        return StepShape(-(-batch_size // (accumulation * world)), accumulation, rank, world)

    @property
    def micro_batches(self) -> range:
        """The numbers of this rank's micro-batches among the micro-batches of all ranks."""
        return range(self.rank, self.accumulation * self.world, self.world)

    @property
    def rows_per_step(self) -> int:
        return self.per_device * self.accumulation * self.world

    def most_rows(self, rows: int) -> int:
        """Return the rows of a micro-batch if a step has at most `rows`, to save dummy rows."""
        return min(self.per_device, -(-rows // (self.accumulation * self.world)))

    def steps_per_epoch(self, rows: int) -> int:
        return -(-rows // self.rows_per_step)


class Part(NamedTuple):
    """The rows of a micro-batch among those of its step, and the teacher that all of them name."""

    rows: NDArray[np.int64]
    teacher: str | None = None


class StepLayout(NamedTuple):
    """Distribution of the rows of an optimizer step over micro-batches.

    shape: number of rows of a step. Without `tokens_per_rank`, also the numbers of micro-batches
        and of their rows.
    tokens_per_rank: the most tokens of a micro-batch, which is then one packed row. The number of
        micro-batches may differ between steps. None: micro-batches of padded rows.
    teachers: the teachers that rows name. A micro-batch then has the rows of one teacher, the same
        on all ranks, so that a step has more micro-batches of fewer rows.
    by_length: padded rows of like lengths share a micro-batch.
    """

    shape: StepShape
    tokens_per_rank: int | None = None
    teachers: tuple[str, ...] = ()
    by_length: bool = False

    def micro_batches(
        self, lengths: NDArray[np.int64], routes: NDArray[np.int64] | None = None
    ) -> list[Part]:
        """Return the rows of every micro-batch of this rank, equally many per rank.

        Args:
            lengths: [N] tokens of every row of the step, the same on all ranks.
            routes: [N] numbers of the teachers that the rows name, if the layout has `teachers`.
        """
        if not self.teachers:
            return list(map(Part, self._split(lengths, self.shape.accumulation)))
        parts: list[Part] = []
        for name in self.teachers:
            mine = np.flatnonzero(routes == teacher_number(name))
            count = -(-len(mine) // (self.shape.per_device * self.shape.world))
            if count:
                parts += (Part(mine[rows], name) for rows in self._split(lengths[mine], count))
        return parts

    def _split(self, lengths: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
        # `count` micro-batches of padded rows, or as many packed rows as needed.
        rank, world = self.shape.rank, self.shape.world
        if self.tokens_per_rank is not None:
            return _budgeted(lengths, self.tokens_per_rank, ranks=world)[rank::world]
        parts = count * world
        if self.by_length:  # the ranks have rows of like lengths at the same time
            order = np.argsort(lengths, kind="stable")
            return [np.sort(part) for part in np.array_split(order, parts)[rank::world]]
        return [np.arange(number, len(lengths), parts) for number in range(rank, parts, world)]

    def most_micro_batches(self, longest: int) -> int:
        """Return the largest number of micro-batches of a rank in a step."""
        if self.tokens_per_rank is None:
            return self.shape.accumulation
        # When a row does not fit, every micro-batch has as many rows as of the longest rows fit.
        rows = max(1, self.tokens_per_rank // longest)
        return -(-self.shape.rows_per_step // (rows * self.shape.world))


def collate_step(
    rows: object,
    layout: StepLayout,
    collate: Collator,
    *,
    routes: NDArray[np.int64] | None = None,
) -> tuple[Batch, ...]:
    """Return this rank's micro-batches of a step.

    `rows` is an arrow table or a mapping of columns with ALL rows of the step, in order, the same
    on all ranks, and `routes` are as in `StepLayout.micro_batches`. A micro-batch without rows has
    all their columns, so that no rank branches on them alone.
    """
    table: Any = rows if isinstance(rows, pa.Table) else pa.table(cast("Any", rows))
    lengths = row_lengths(table)
    size = layout.shape.most_rows(len(lengths))
    return tuple(
        micro_batch(table.take(part.rows), part, layout, collate, size=size)
        for part in layout.micro_batches(lengths, routes)
    )


def micro_batch(
    rows: object, part: Part, layout: StepLayout, collate: Collator, *, size: int
) -> Batch:
    """Return one micro-batch of the rows of a part, packed if the layout says so.

    Other micro-batches have dummy rows up to `size`, or at least one row if the rows name a
    teacher. Without rows, nothing is valid.
    """
    count = len(part.rows)
    if part.teacher is not None or layout.tokens_per_rank is not None:
        size = max(count, 1)
    batch = collate(rows, dummy_rows=size - count)
    if layout.tokens_per_rank is not None:
        batch = packed_row(batch, most=layout.tokens_per_rank)
    return batch if part.teacher is None else batch.extended(teacher=part.teacher)


def packed_row(batch: Batch, *, most: int) -> Batch:
    """Return the valid positions of all rows as one row, [1, T].

    Positions restart with every row, and wherever they restarted in a row. T is a multiple of 8,
    but at most `most`; padding at the end is a document of its own.
    """
    count = int(batch.valid.sum())
    padding = padded_width(count, most) - count

    def flat(values: Tensor, fill: int) -> Tensor:
        return functional.pad(values[batch.valid], (0, padding), value=fill)[None]

    given = batch.inputs["position_ids"][batch.valid]
    positions = torch.cat([given, torch.arange(padding)])[None]
    return Batch(
        {"input_ids": flat(batch.inputs["input_ids"], 0), "position_ids": positions},
        flat(batch.labels, IGNORE),
        flat(batch.valid, 0),
        documents=documents_of(positions.numpy()),
    )


def row_lengths(rows: pa.Table) -> NDArray[np.int64]:
    """Return [N] tokens of every row, without reading the tokens."""
    column = cast("Any", rows).column("input_ids")  # pyarrow carries no types
    return cast("Any", pc).list_value_length(column).to_numpy().astype(np.int64)


def _budgeted(lengths: NDArray[np.int64], budget: int, *, ranks: int) -> list[NDArray[np.int64]]:
    # First fit by decreasing length finds the number of micro-batches, which is rounded up to a
    # multiple of the ranks. The rows are then spread evenly over all micro-batches if none exceeds
    # the budget that way. Micro-batch k belongs to rank k modulo `ranks`; some may have no row.
    if len(lengths) and lengths.max() > budget:
        raise DataError(
            f"train.tokens_per_rank is {budget}, and a training row has {lengths.max()} tokens; "
            "raise train.tokens_per_rank, or shorten the rows (task.max_length, or generated texts)"
        )
    order = np.argsort(-lengths, kind="stable")
    tightest = _first_fit(lengths[order], budget)
    count = -(-(int(tightest.max(initial=0)) + 1) // ranks) * ranks
    even = _spread(lengths[order], count)
    chosen = tightest if np.bincount(even, lengths[order], count).max() > budget else even
    micro_batch_of = np.empty_like(chosen)
    micro_batch_of[order] = chosen
    dealt = _dealt(np.bincount(chosen, lengths[order], count).astype(np.int64), ranks)
    return [np.flatnonzero(micro_batch_of == number) for number in dealt]


def _first_fit(lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    loads = np.zeros(max(1, len(lengths)), dtype=np.int64)
    chosen = np.zeros(len(lengths), dtype=np.int64)
    for index, length in enumerate(lengths):
        chosen[index] = np.argmax(loads[: index + 1] + length <= budget)
        loads[chosen[index]] += length
    return chosen


def _spread(lengths: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    loads = [(0, number) for number in range(count)]
    chosen = np.zeros(len(lengths), dtype=np.int64)
    for index, length in enumerate(lengths.tolist()):
        load, chosen[index] = loads[0]
        heapq.heapreplace(loads, (load + length, int(chosen[index])))
    return chosen


def _dealt(loads: NDArray[np.int64], ranks: int) -> list[int]:
    # Micro-batches that run at the same time are about equally long, and the longest of them goes
    # to the rank with the fewest tokens so far.
    totals = np.zeros(ranks, dtype=np.int64)
    dealt: list[int] = []
    for turn in np.argsort(-loads, kind="stable").reshape(-1, ranks):
        of_rank = np.empty_like(turn)
        of_rank[np.argsort(totals, kind="stable")] = turn
        totals += loads[of_rank]
        dealt += of_rank.tolist()
    return dealt
