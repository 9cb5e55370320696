"""Detection of teachers' answers that are not finite.

The error message can then name the teacher instead of the learning rate as the cause.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megakd.contract.batch import Batch, Knowledge
from megakd.contract.stage import Teacher
from megakd.engine.collectives import all_reduce_


class WatchedTeacher:
    """A teacher with a sum on the device that is not finite after an answer that was not."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._sum: Tensor | float = 0.0

    @property
    def has_failed(self) -> bool:
        """Whether an answer was NaN or infinite; reading it waits for the device."""
        return not math.isfinite(self._sum)

    def __call__(self, batch: Batch) -> Knowledge:
        """Return the teacher's answer and update the sum, without a device sync."""
        return self._watched(batch, self._teacher(batch))

    def answers(self, batches: Sequence[Batch]) -> Iterator[Knowledge]:
        """Yield the teacher's answers to every micro-batch, and update the sum."""
        for batch, read in zip(batches, self._teacher.answers(batches), strict=True):
            yield self._watched(batch, read)

    def _watched(self, batch: Batch, read: Knowledge) -> Knowledge:
        self._sum = self._sum + _sum_of(read, batch)
        return read

    def prefetch(self) -> None:
        self._teacher.prefetch()

    def evict(self) -> None:
        self._teacher.evict()


def failed_teachers(teachers: Mapping[str, object], device: torch.device) -> list[str]:
    """Return the watched teachers with an answer that was not finite on any rank; a collective."""
    if not teachers:
        return []
    flags = [float(getattr(teacher, "has_failed", False)) for teacher in teachers.values()]
    seen = all_reduce_(torch.tensor(flags, device=device), largest=True).tolist()
    return [name for name, flag in zip(teachers, seen, strict=True) if flag]


def _sum_of(read: Knowledge, batch: Batch) -> Tensor | float:
    """Return the sum over the rows that count, in fp32, in which fp16 does not overflow."""
    valid = batch.valid
    if read.logits is not None:
        values, counts = read.logits, valid.any(dim=1)  # [B, C]
    elif read.hidden is not None and batch.targets is not None:
        values = read.hidden  # [N, D]
        counts = valid.flatten()[batch.targets]
    elif read.hidden is not None:
        values, counts = read.hidden, valid  # [B, T, D]
    else:
        return 0.0
    return values.sum(dim=-1, dtype=torch.float32).where(counts, 0.0).sum()
