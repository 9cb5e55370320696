"""The members that the lab of a run and the lab of a plan share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from megakd.config.run import RunConfig
from megakd.contract.lab import Pruning
from megakd.contract.results import MethodRecord
from megakd.contract.stage import Stage, StageResult
from megakd.contract.tasks import STUDENT, TEACHER
from megakd.contract.terms import TermConfig, hard_terms, soft_terms
from megakd.inputs.inputs import as_student
from megakd.models.source import ModelSource, ReadyTeacher
from megakd.training.recipes import completed, label_terms


class LabBase(ABC):
    """The part of a lab that follows from the configs of the run and of its models; see `Lab`."""

    def __init__(self, config: RunConfig, sources: Mapping[str, ModelSource]) -> None:
        self.config = config
        self.results: list[StageResult] = []
        self.record = MethodRecord()
        self._sources = sources
        self._teachers: dict[str, ReadyTeacher] = {}

    @abstractmethod
    def train(self, stage: Stage) -> StageResult: ...

    @abstractmethod
    def with_embeddings(self, result: StageResult) -> ModelSource: ...

    @abstractmethod
    def _source(self, folder: Path, role: str) -> ModelSource:
        """Return the model that a stage wrote; messages name the config's section of `role`."""

    def hard_terms(self, weight: float = 1.0, *, per_row: bool = False) -> tuple[TermConfig, ...]:
        return hard_terms(self.config.task.type, weight, per_row=per_row)

    def soft_terms(self, weight: float = 1.0) -> tuple[TermConfig, ...]:
        return soft_terms(self.config.task.type, weight)

    def teacher(self, name: str | None = None) -> str:
        name = name or TEACHER
        if name not in self._teachers:
            spec, source = self.config.teacher_specs[name], self._sources[name]
            if spec.finetune is not None:
                objective = label_terms(self.config, smoothed=False)
                stage = Stage(name=f"{name}-finetune", learners={name: 1.0}, objective=objective)
                source = self._source(self.train(stage).folder, name)
            self._teachers[name] = ReadyTeacher(source, spec)
        return name

    def as_teacher(self, result: StageResult, *, like: str = TEACHER) -> str:
        # A cache holds the answers of the configured teacher, not those of another model.
        spec = dataclasses.replace(self.config.teacher_specs[like], cache=None)
        self._teachers[result.name] = ReadyTeacher(self._source(result.folder, like), spec)
        return result.name

    def _completed(self, stage: Stage, *, ranks: int, device: str) -> Stage:
        stage = completed(stage, self.config, ranks=ranks, device=device)
        if stage.start is not None or stage.role != STUDENT:
            return stage
        return dataclasses.replace(stage, start=self._start())

    def _start(self) -> ModelSource | None:
        """Return the layers of the teacher, as it teaches, that the student keeps, if it does."""
        role = self.config.start_role
        if role == STUDENT or self.config.student.layers is None:
            return None
        scores = self.pruning.layer_scores(self.teacher(role)) if self.config.ranks_layers else None
        return as_student(self._teachers[self.teacher(role)].source, self.config, scores)

    @property
    @abstractmethod
    def pruning(self) -> Pruning:
        """The tools of methods that cut models."""

    def given(self, role: str) -> ModelSource:
        return self._sources[role]

    def source(self, folder: Path) -> ModelSource:
        return self._source(folder, STUDENT)

    def model(self, teacher: str) -> ModelSource:
        return self._teachers[teacher].source
