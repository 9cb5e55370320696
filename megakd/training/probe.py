"""Measurements for a strategy while a stage runs; all methods are collectives."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from megakd.engine.collectives import on_main
from megakd.engine.student import StudentEngine
from megakd.errors import CheckpointError
from megakd.process.folders import Entries, damage, write_files, write_manifest
from megakd.training.checkpoint import entries_of_ranks
from megakd.training.scorer import Scorer

BEGINNING = "beginning"
"""Folder of the initial state of a student, in the folder of a stage's checkpoints."""


@dataclass(frozen=True)
class StageProbe:
    """The loss on held-out rows, and the initial student; every method is a collective.

    folder: stores the initial state of the student.
    """

    scorer: Scorer
    rows: Dataset
    folder: Path

    def loss(self, student: StudentEngine) -> float:
        return self.scorer.loss(student.predict, self.rows)

    def remember(self, student: StudentEngine) -> None:
        partial = self.folder / f"{BEGINNING}.partial"
        contents = student.files()
        on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        files = entries_of_ranks(lambda: write_files(partial, contents))
        on_main(lambda: self._publish(partial, files))

    def _publish(self, partial: Path, files: Entries) -> None:
        write_manifest(partial, files)
        shutil.rmtree(self.folder / BEGINNING, ignore_errors=True)
        partial.rename(self.folder / BEGINNING)

    def reset(self, student: StudentEngine) -> None:
        student.load(self.folder / BEGINNING)

    def check_remembered(self) -> None:
        folder = self.folder / BEGINNING
        reason = on_main(lambda: damage(folder))
        if reason is not None:
            raise CheckpointError(
                f"{folder} is damaged: {reason}, and the next episodes start from this student; "
                f"remove {self.folder} to train the stage again"
            )
