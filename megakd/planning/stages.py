"""The phases of a run, found by running its method in a lab that does not train."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from megakd.config.run import RunConfig, TeacherConfig
from megakd.contract.results import ParameterCounts
from megakd.contract.stage import Stage, StageResult, untrained
from megakd.contract.tasks import TEACHER
from megakd.contract.units import View
from megakd.methods import run_method
from megakd.models.source import ModelSource
from megakd.pruning.store import SortedTeacher, largest_first, shape_of_cut, unscored
from megakd.training.engines import ReadyTeacher, learning_models
from megakd.training.lab_base import LabBase
from megakd.training.recipes import baseline_stage, completed, scoring_preset

IMPORTANCE = "specification"
Work = Literal["training", "importance", "scoring", "timing"]


class Importance(NamedTuple):
    """Options of the importance phase: rows of a batch over all ranks, and scoring of width."""

    batch_size: int
    with_width: bool


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run with a fixed set of models in memory.

    work: training, or a kind of work with frozen models.
    stage: the stage that is trained; None for other work.
    learners: the trained models by role; for other work, the first model.
    teachers: the frozen models by name: teachers of a training, or the models of other work.
    importance: options of the work "importance".
    """

    name: str
    work: Work = "training"
    learners: Mapping[str, ModelSource]
    stage: Stage | None = None
    teachers: Mapping[str, ReadyTeacher] = field(default_factory=dict)
    importance: Importance | None = None

    @property
    def learner(self) -> ModelSource:
        """The model that the stage returns."""
        return next(iter(self.learners.values()))


def phases_of(config: RunConfig, sources: Mapping[str, ModelSource]) -> list[Phase]:
    """Return all phases of a run, in order.

    If a method chooses an assistant by score, the plan uses the largest assistant.

    Raises:
        MegakdError: the method cannot work with these models.
    """
    lab = PlanningLab(config, sources)
    student = run_method(config.method, lab)
    baselines = [lab.train(baseline_stage(lab, name, student)) for name in config.baselines]
    lab.close([student, *baselines])
    return lab.phases


class _AnyScore(Mapping[str, float]):
    """Scores in which every metric is 0.5."""

    def __getitem__(self, name: str) -> float:
        return 0.5

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class PlanningLab(LabBase):
    """Lab that records the stages of a method instead of running them."""

    def __init__(self, config: RunConfig, sources: Mapping[str, ModelSource]) -> None:
        super().__init__(config, sources)
        self.phases: list[Phase] = []
        self._assistants: list[StageResult] = []
        self._made: dict[Path, ModelSource] = {}

    def largest_first(self) -> tuple[str, ...]:
        """Return the names of all teachers by decreasing number of weights."""
        sources = {name: self._sources[name] for name in self.config.teacher_specs}
        return largest_first(sources, self.config.task)

    def _source(self, folder: Path, role: str) -> ModelSource:
        """Return the model that a stage writes to its folder."""
        del role
        return self._made[folder]

    def steps_of_student(self) -> int:
        """Return `max_steps`, or 1 if it is not set, because the rows are not counted."""
        return self.config.train.max_steps or 1

    def probe(self, stage: str) -> None:
        """Do nothing, because there is nothing to measure."""
        del stage

    def made_by(self, result: StageResult, name: str, read: Any) -> None:
        """Return None, because nothing was trained."""
        del result, name, read

    def worth(self, metrics: Any) -> float:
        """Return the same worth for all models."""
        del metrics
        return 0.5

    def dev_score(self, name: str) -> float:
        """Record the scoring of a teacher; return the same score for all teachers."""
        self._note("scoring", f"{name}-scored", {name: self._teachers[name]})
        return 0.5

    def close(self, students: Sequence[StageResult]) -> None:
        """Record the end of a run: all models are scored, then timed together.

        Args:
            students: the student and the baselines.
        """
        preset = scoring_preset(self.config.student.deepspeed)
        made = {r.name: self._made[r.folder] for r in (*students, *self._assistants)}
        made_ready = {name: _ready(source, preset) for name, source in made.items()}
        teachers = {n: self._teachers[n] for n in self.config.teacher_specs if n in self._teachers}
        for name, ready in {**made_ready, **teachers}.items():
            self._note("scoring", f"{name}-scored", {name: ready})
        stored = {name: ready for name, ready in teachers.items() if _has_weights(ready.spec)}
        if stored:
            timed = {**stored, **made_ready}
            whole = {name: _ready(one.source, "teacher_zero0") for name, one in timed.items()}
            self._note("timing", "latency", whole)

    def _note(self, work: Work, name: str, models: Mapping[str, ReadyTeacher]) -> None:
        first = {role: ready.source for role, ready in models.items()}
        self.phases.append(Phase(name=name, work=work, learners=first, teachers=models))

    def train(self, stage: Stage) -> StageResult:
        """Record a stage; return a result whose chosen view is the widest view."""
        stage = completed(stage, self.config)
        learners = learning_models(stage, self._sources, self._teachers)
        teachers = {name: self._teachers[name] for name in stage.teachers}
        phase = Phase(name=stage.name, learners=learners, stage=stage, teachers=teachers)
        self.phases.append(phase)
        view, learner = next(iter(stage.views), None), phase.learner
        made = learner if view is None else self.cut(learner, stage.views[view], stage.name)
        result = self._result(stage.name, made, views=tuple(stage.views), view=view)
        for role, beside in list(learners.items())[1:]:
            self._made[result.folder / role] = beside
        return result

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

    def unscored(self) -> SortedTeacher:
        """Return the teacher's units without scores."""
        return unscored(self._sources[TEACHER])

    def sorted_teacher(
        self, teacher: str, split: str, *, batch_size: int, residual: bool
    ) -> SortedTeacher:
        """Record the importance phase, once per run."""
        del split
        ready = self._teachers[teacher]
        if not any(known.name == IMPORTANCE for known in self.phases):
            phase = Phase(
                name=IMPORTANCE,
                work="importance",
                learners={teacher: ready.source},
                teachers={teacher: ready},
                importance=Importance(batch_size, residual),
            )
            self.phases.append(phase)
        return unscored(ready.source)

    def cut(self, source: ModelSource, view: View, name: str) -> ModelSource:
        """Return the shape of the cut model; the cut itself runs tensor by tensor on one rank."""
        del name
        return shape_of_cut(source, view, self.config.task.type)

    def assistant(self, result: StageResult, sparsity: float | None, *, like: str = TEACHER) -> str:
        """Make a stage's model a teacher that is scored at the end."""
        del sparsity
        self._assistants.append(result)
        return self.as_teacher(result, like=like)

    def metric(self, name: str | None) -> Any:
        """Return a metric with the same score for every model."""
        del name
        return SimpleNamespace(of=lambda _: 0.5)

    def parameters(self, source: ModelSource, view: View) -> ParameterCounts:
        """Return zeros, because the plan does not use these counts."""
        del source, view
        return ParameterCounts(0, 0)


def _has_weights(spec: TeacherConfig) -> bool:
    """Return whether a teacher is stored in a folder at the end of the run."""
    return spec.finetune is not None or isinstance(spec.model, str)


def _ready(source: ModelSource, preset: str) -> ReadyTeacher:
    """Return a finished model with the settings for scoring or timing."""
    return ReadyTeacher(source, TeacherConfig(model=source.name, deepspeed=preset, dtype="fp32"))
