"""The losses of a stage and the model outputs that they need, for runs and memory plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megakd.contract.stage import Stage
from megakd.contract.tasks import TaskType
from megakd.contract.terms import MethodTerm, hard_terms
from megakd.contract.views import Shape
from megakd.errors import ConfigError
from megakd.losses.objective import Objective, build_objective, check_terms, teacher_needs
from megakd.models.knowledge import Needs
from megakd.models.source import ModelSource, ReadyTeacher


@dataclass(frozen=True, kw_only=True)
class StageLosses:
    """The loss terms of a stage between models of known shapes.

    teacher: the shape of the first teacher; None without a teacher. If losses compare layers, all
        teachers of a stage have the same shape.
    families: the families of the models that learn, in their order.
    """

    stage: Stage
    task: TaskType
    student: Shape
    teacher: Shape | None
    families: tuple[str, ...] = ()

    def check_outputs(self, key: str, teacher: ReadyTeacher) -> None:
        """Raise if the losses read more of a teacher than its cache or its server gives."""
        part = "server" if teacher.spec.cache is None else "cache"
        if (teacher.spec.cache or teacher.spec.server) and self.teacher_needs() != Needs():
            raise ConfigError(
                f"{key}.{part} holds only the outputs of the teacher, and the losses of this "
                "method need more; remove the key, or use only soft targets"
            )

    def teacher_needs(self) -> Needs:
        """Return the outputs that the losses and the strategy need from the teachers' forward."""
        if self.teacher is None:
            return Needs()
        needs = teacher_needs(self.stage.objective, self.student, self.teacher)
        return self._with_states(needs, self.teacher)

    def check(self) -> None:
        check_terms(self.stage.objective, self.student, self.teacher)
        for term in self.stage.objective:
            if isinstance(term, MethodTerm):
                term.check(self.student, self.teacher, self.families)

    def objective(self) -> Objective:
        """Build the objective, which also states the outputs needed from the student's forward."""
        made = build_objective(self.stage.objective, self.task, self.student, self.teacher)
        made.needs = self._with_states(made.needs, self.student)
        return made

    def _with_states(self, needs: Needs, shape: Shape) -> Needs:
        return needs.with_hidden(shape.layers) if self.stage.strategy.reads_states else needs


def stage_losses(
    stage: Stage,
    task: TaskType,
    *,
    learners: Mapping[str, ModelSource],
    teachers: Sequence[ModelSource],
    classes: int,
) -> StageLosses:
    """Return the losses of a stage with its learners (`learners_of`) and its frozen teachers."""
    student, *beside = (shape_of(source, task, classes) for source in learners.values())
    frozen = (shape_of(source, task, classes) for source in teachers)
    teacher = next(iter((*frozen, *beside)), None)
    families = tuple(source.config.model_type for source in learners.values())
    return StageLosses(stage=stage, task=task, student=student, teacher=teacher, families=families)


def learners_of(stage: Stage, sources: Mapping[str, ModelSource]) -> dict[str, ModelSource]:
    """Return the models that learn in a stage, by role; the first is the stage's own model."""
    first = stage.start or sources[stage.role]
    return {stage.role: first, **{role: sources[role] for role in stage.beside}}


def label_objective(source: ModelSource, task: TaskType, classes: int) -> Objective:
    """Return the objective on labels for a task, for a model without a teacher."""
    return build_objective(hard_terms(task), task, shape_of(source, task, classes), None)


def shape_of(source: ModelSource, task: TaskType, classes: int) -> Shape:
    """Return the shape of a model, as losses need it; a classifier has the classes of the data."""
    config, architecture = source.config, source.architecture
    outputs = {"classification": classes, "regression": 1}.get(task)
    return Shape(
        architecture.number_of_layers(config),
        architecture.hidden_width(config),
        config.vocab_size if outputs is None else outputs,
        architecture.heads(config),
    )
