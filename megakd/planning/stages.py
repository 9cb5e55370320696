"""Which trainings a run consists of: its method is asked, in a lab where nothing is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megakd.assembly import ReadyTeacher
from megakd.config import STUDENT, TEACHER, RunConfig
from megakd.methods import run_method
from megakd.models.loading import ModelSource
from megakd.models.units import View
from megakd.pruning import Specification, largest_first, shape_of_cut, unscored
from megakd.recipes import baseline_stage, completed, finetuning_stage
from megakd.report import ParameterCounts
from megakd.stage import Stage, StageResult, untrained
from megakd.terms import TermConfig, hard_terms, soft_terms

IMPORTANCE = "specification"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One thing that a run does with its models in memory.

    stage: what is trained; None where importance is measured.
    learner: the model that learns, or whose importance is measured.
    teachers: by name, those that answer meanwhile, or the one whose importance it is.
    """

    name: str
    learner: ModelSource
    stage: Stage | None = None
    teachers: Mapping[str, ReadyTeacher] = field(default_factory=dict)


def phases_of(config: RunConfig, sources: Mapping[str, ModelSource]) -> list[Phase]:
    """Everything a run does with its models, in order.

    An assistant that a method chooses by its score is taken to be the largest there is.

    Raises:
        MegakdError: the method finds that it cannot work with these models.
    """
    lab = PlanningLab(config, sources)
    student = run_method(config.method, lab)  # type: ignore[arg-type]
    for name in config.baselines:
        lab.train(baseline_stage(lab, name, student))  # type: ignore[arg-type]
    return lab.phases


class _AnyScore(Mapping[str, float]):
    """Every metric there may be, at one half."""

    def __getitem__(self, name: str) -> float:
        return 0.5

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class PlanningLab:
    """What a method takes for the lab: it notes the stages instead of running them."""

    def __init__(self, config: RunConfig, sources: Mapping[str, ModelSource]) -> None:
        self.config = config
        self.phases: list[Phase] = []
        self.results: list[StageResult] = []
        self.record = SimpleNamespace(candidates=[], assistants=[], dev_scores={})
        self._sources = dict(sources)
        self._made: dict[Path, ModelSource] = {}
        self._teachers: dict[str, ReadyTeacher] = {}

    def hard_terms(self, weight: float = 1.0) -> tuple[TermConfig, ...]:
        """The loss on labels that fits the task."""
        return hard_terms(self.config.task.type, weight)

    def soft_terms(self, weight: float = 1.0) -> tuple[TermConfig, ...]:
        """The loss on the teacher's outputs that fits the task."""
        return soft_terms(self.config.task.type, weight)

    @property
    def teacher_layers(self) -> int:
        """How many layers the teacher has."""
        teacher = self._sources[TEACHER]
        return teacher.architecture.number_of_layers(teacher.config)

    def teacher(self, name: str | None = None) -> str:
        """A teacher's name, after the phase of its fine-tuning."""
        name = name or TEACHER
        if name not in self._teachers:
            spec = self.config.teacher_specs[name]
            self._teachers[name] = ReadyTeacher(self._sources[name], spec)
            stage = finetuning_stage(self.config, name)
            if stage is not None:
                self.train(stage)
        return name

    def teachers(self) -> tuple[str, ...]:
        """The names of all teachers, after the phases of their fine-tuning."""
        return tuple(self.teacher(name) for name in self.config.teacher_specs)

    def largest_first(self) -> tuple[str, ...]:
        """The names of all teachers by falling number of weights."""
        sources = {name: self._sources[name] for name in self.config.teacher_specs}
        return largest_first(sources, self.config.task)

    def widths(self, teacher: str) -> tuple[int, int]:
        """Of the hidden states of the student and of a teacher."""
        student, taught = (
            source.architecture.hidden_width(source.config)
            for source in (self._sources[STUDENT], self._sources[teacher])
        )
        return student, taught

    def steps_of_student(self) -> int:
        """The rows are not counted."""
        return self.config.train.max_steps or 1

    def instruments(self, stage: str) -> None:
        """There is nothing to measure."""
        del stage

    def made_by(self, result: StageResult, name: str, read: Any) -> None:
        """Nothing was made."""
        del result, name, read

    def worth(self, metrics: Any) -> float:
        """All models are worth the same."""
        del metrics
        return 0.5

    def dev_score(self, name: str) -> float:
        """The same of all."""
        del name
        return 0.5

    def train(self, stage: Stage) -> StageResult:
        """Notes a stage; gives the widest of its views as the one that was chosen."""
        learner = stage.start or self._sources[stage.role]
        stage = completed(stage, self.config)
        teachers = {name: self._teachers[name] for name in stage.teachers}
        self.phases.append(Phase(name=stage.name, learner=learner, stage=stage, teachers=teachers))
        view = next(iter(stage.views), None)
        made = learner if view is None else self.cut(learner, stage.views[view], stage.name)
        return self._result(stage.name, made, views=tuple(stage.views), view=view)

    def _result(
        self,
        name: str,
        source: ModelSource,
        *,
        views: tuple[str, ...] = (),
        view: str | None = None,
    ) -> StageResult:
        folder = Path("stages") / name
        self._made[folder] = source
        result = dataclasses.replace(
            untrained(name, folder),
            metrics=_AnyScore(),
            scores={name: _AnyScore() for name in views},
            view=view,
        )
        self.results.append(result)
        return result

    def unscored(self) -> Specification:
        """The teacher's units, all alike."""
        return unscored(self._sources[TEACHER])

    def specify(
        self, teacher: str, split: str, *, batch_size: int, residual: bool
    ) -> Specification:
        """Notes that importance is measured, which happens once."""
        del split, batch_size, residual
        ready = self._teachers[teacher]
        phase = Phase(name=IMPORTANCE, learner=ready.source, teachers={teacher: ready})
        if not any(known.name == IMPORTANCE for known in self.phases):
            self.phases.append(phase)
        return unscored(ready.source)

    def cut(self, source: ModelSource, view: View, name: str) -> ModelSource:
        """The model as it will be cut, which happens tensor by tensor on one rank."""
        del name
        return shape_of_cut(source, view, self.config.task.type)

    def source(self, folder: Path) -> ModelSource:
        """What a stage will leave in its folder."""
        return self._made[folder]

    def fresh_like(self, folder: Path) -> ModelSource:
        """Another of the same shape."""
        return self._made[folder]

    def as_teacher(self, result: StageResult, *, like: str = TEACHER) -> str:
        """Makes a stage's model a teacher, by the stage's name."""
        spec = self.config.teacher_specs[like]
        self._teachers[result.name] = ReadyTeacher(self._made[result.folder], spec)
        return result.name

    def assistant(self, result: StageResult, sparsity: float) -> str:
        """The same."""
        del sparsity
        return self.as_teacher(result)

    def metric(self, name: str | None) -> Any:
        """A metric of which every model scores the same."""
        del name
        return SimpleNamespace(of=lambda _: 0.5)

    def parameters(self, source: ModelSource, view: View) -> ParameterCounts:
        """Of no interest here."""
        del source, view
        return ParameterCounts(0, 0)
