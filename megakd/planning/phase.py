"""Parts of a planned run, each with a fixed set of models in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megakd.contract.stage import Stage
from megakd.models.source import ModelSource, ReadyTeacher

Work = Literal["training", "importance", "scoring", "timing"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run with a fixed set of models in memory.

    work: training, or a kind of work with frozen models.
    stage: the stage that is trained; None for other work.
    learners: the trained models by role; empty for other work.
    bases: by name, the teachers that are the learner without its adapters.
    teachers: the frozen models by name: teachers of a training, or the models of other work.
    rows: rows of a batch of other work on one rank.
    forwards: number of forwards of other work that is more than one pass.
    with_width: whether the importance of the width is measured too.
    """

    name: str
    work: Work = "training"
    stage: Stage | None = None
    learners: Mapping[str, ModelSource] = field(default_factory=dict)
    bases: Mapping[str, ModelSource] = field(default_factory=dict)
    teachers: Mapping[str, ReadyTeacher] = field(default_factory=dict)
    rows: int = 0
    forwards: int = 0
    with_width: bool = False
    student: ModelSource | None = None

    @property
    def learner(self) -> ModelSource:
        """The model that the stage returns."""
        return next(iter(self.learners.values()))

    @property
    def teaching(self) -> list[ModelSource]:
        return [*(ready.source for ready in self.teachers.values()), *self.bases.values()]
