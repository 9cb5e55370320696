"""Detection of teachers' answers that are not finite.

The error message can then name the teacher instead of the learning rate as the cause.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megakd.contract.batch import Batch, Knowledge
from megakd.contract.stage import Teacher
from megakd.engine.collectives import all_reduce_


class WatchedTeacher:
    """A teacher with a flag on the device that is set when an answer is NaN or infinite."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self.failed: Tensor | None = None

    def __call__(self, batch: Batch) -> Knowledge:
        """Return the teacher's answer and update the flag, without a device sync."""
        return self._watched(batch, self._teacher(batch))

    def answers(self, batches: Sequence[Batch]) -> Iterator[Knowledge]:
        """Yield the teacher's answers to every micro-batch, and update the flag."""
        for batch, read in zip(batches, self._teacher.answers(batches), strict=True):
            yield self._watched(batch, read)

    def _watched(self, batch: Batch, read: Knowledge) -> Knowledge:
        bad = ~_finite(read, batch)
        self.failed = bad if self.failed is None else self.failed | bad
        return read

    def prefetch(self) -> None:
        self._teacher.prefetch()

    def evict(self) -> None:
        self._teacher.evict()


def failed_teachers(teachers: Mapping[str, object], device: torch.device) -> list[str]:
    """Return the watched teachers with an answer that was not finite on any rank; a collective."""
    if not teachers:
        return []
    notes = [getattr(teacher, "failed", None) for teacher in teachers.values()]
    flags = [torch.zeros((), device=device) if n is None else n.float() for n in notes]
    seen = all_reduce_(torch.stack(flags), largest=True).tolist()
    return [name for name, flag in zip(teachers, seen, strict=True) if flag]


def _finite(read: Knowledge, batch: Batch) -> Tensor:
    valid = batch.valid
    if read.logits is not None:
        values, counts = read.logits, valid.any(dim=1)  # [B, C]
    elif read.hidden is not None and batch.targets is not None:
        values = read.hidden  # [N, D]
        counts = valid.flatten()[batch.targets]
    elif read.hidden is not None:
        values, counts = read.hidden, valid  # [B, T, D]
    else:
        return torch.ones((), dtype=torch.bool, device=valid.device)
    return (torch.isfinite(values).all(dim=-1) | ~counts).all()
