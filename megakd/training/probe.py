"""Measurements for a strategy while a stage runs; all methods are collectives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megakd.engine.distributed import all_reduce_

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from megakd.engine.student import StudentEngine
    from megakd.training.scoring import Scorer


BEGINNING = "beginning"


@dataclass(frozen=True)
class HeldOutProbe:
    """Sums over ranks, the loss on held-out rows, and the initial state of the student.

    scorer: the scorer of the run. rows: the rows that the loss is measured on.
    folder: the folder that stores the initial state of the student.
    """

    scorer: Scorer
    rows: Dataset
    folder: Path

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        return all_reduce_(tensor)

    def loss(self, student: StudentEngine) -> float:
        """Return cross-entropy or squared error on the rows, the same on every rank."""
        return self.scorer.loss(student.predict, self.rows)

    def remember(self, student: StudentEngine) -> None:
        """Save the student, its optimizer included."""
        student.save(self.folder, BEGINNING)

    def reset(self, student: StudentEngine) -> None:
        """Restore the saved student without a new engine."""
        student.load(self.folder, BEGINNING)
