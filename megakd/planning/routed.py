"""A micro-batch whose rows are divided among teachers, for traces without values.

The student's losses need about the same memory for every division of the rows. Only the largest
forward of a teacher depends on the division: it has all rows of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from megakd.contract.batch import Batch, Knowledge, Within
from megakd.contract.joined_batches import Part, part_of
from megakd.planning.tracing import VALUELESS

if TYPE_CHECKING:
    from megakd.contract.stage import Stage


def with_even_parts(batch: Batch, stage: Stage, make: Callable[[int, int], Batch]) -> Batch:
    """Return a micro-batch in which every teacher of a routed stage has an equal part of the rows.

    Args:
        batch: a micro-batch without values.
        stage: the stage; the batch of a stage that is not routed is returned as it is.
        make: function that returns a batch of a number of rows and of positions per row.
    """
    if not stage.strategy.routes_rows:
        return batch
    (rows, length), teachers = batch.valid.shape, stage.teachers
    if rows < len(teachers):  # the positions of a packed row are divided
        length = math.ceil(rows * length / len(teachers))
    part = make(math.ceil(rows / len(teachers)), length)
    targets = None if part.targets is None else torch.ones_like(part.targets)
    with VALUELESS:
        places = torch.ones(part.valid.shape, dtype=torch.long)
        within = Within(places[:, 0], places, targets)
    return batch._replace(others=dict.fromkeys(teachers, part._replace(within=within)))


def answers_to_parts(batch: Batch, answers: Mapping[str, Knowledge]) -> dict[str, Knowledge]:
    """Return the answers of teachers to the whole micro-batch, cut to the part of each teacher."""
    return {name: _cut(said, batch.of(name)) for name, said in answers.items()}


def _cut(said: Knowledge, part: Batch) -> Knowledge:
    if part.within is None:
        return said
    rows, length = part.valid.shape
    targets = 0 if part.targets is None else len(part.targets)
    return part_of(said, Part(slice(rows), length, slice(targets), slice(0)))


def waiting_bytes(plan: Sequence[str], sizes: Mapping[str, int], *, routed: bool) -> int:
    """Return the bytes of the answers of a step's teachers, kept while the learner runs.

    Args:
        plan: the teachers of the step.
        sizes: bytes of each teacher's answer to a whole micro-batch.
        routed: whether the rows are divided among the teachers.
    """
    own = [sizes[name] for name in plan if name in sizes]
    return max(own, default=0) if routed else sum(own)
