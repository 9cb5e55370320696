"""Detection of teachers' answers that are not finite.

The error message can then name the teacher instead of the learning rate as the cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megakd.contract.batch import Batch, Knowledge
from megakd.engine.collectives import all_reduce_


class AnswerWatch:
    """By teacher, a sum on the device that stays not finite after an answer that was not."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}

    def add(self, knowledge: Mapping[str, Knowledge], batch: Batch) -> None:
        """Update the sums with the answers to a micro-batch, without a device sync."""
        for name, answer in knowledge.items():
            self._sums[name] = self._sums.get(name, 0.0) + _sum_of(answer, batch.of(name))

    def failed(self, device: torch.device) -> list[str]:
        """Return the teachers with an answer that was not finite on any rank; a collective."""
        if not self._sums:
            return []
        flags = [float(not math.isfinite(total)) for total in self._sums.values()]
        seen = all_reduce_(torch.tensor(flags, device=device), largest=True).tolist()
        return [name for name, flag in zip(self._sums, seen, strict=True) if flag]


def _sum_of(answer: Knowledge, batch: Batch) -> Tensor | float:
    """Return the sum over the rows that count, in fp32, in which fp16 does not overflow."""
    valid = batch.valid
    if answer.logits is not None:
        values, counts = answer.logits, valid.any(dim=1)  # [B, C]
    elif answer.hidden is not None and batch.targets is not None:
        values = answer.hidden  # [N, D]
        counts = valid.flatten()[batch.targets]
    elif answer.hidden is not None:
        values, counts = answer.hidden, valid  # [B, T, D]
    else:
        return 0.0
    return values.sum(dim=-1, dtype=torch.float32).where(counts, 0.0).sum()
