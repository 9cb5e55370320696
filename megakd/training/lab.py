"""What a method is written against: the lab of a run, and the work that it asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

from megakd.config.options import file_of
from megakd.config.run import RunConfig
from megakd.config.sections import TeacherConfig, inherit
from megakd.config.task import FROM_TEACHER, STUDENT, TEACHER
from megakd.config.terms import HardCrossEntropy, TermConfig, hard_terms, soft_terms
from megakd.stage import Stage, StageResult
from megakd.training.record import Assistant, MethodRecord

if TYPE_CHECKING:
    from megakd.models.fitting import ModelSource, ReadyTeacher
    from megakd.models.views import View
    from megakd.training.allocation import SortedTeacher
    from megakd.training.facts import RunFacts

T = TypeVar("T")

Files = Callable[[], Mapping[str, bytes]]

Model: TypeAlias = "ModelSource"
"""A model that a stage can start from. A method passes the model on and never opens it."""


class Work(Protocol):
    """What a lab has done: a run does it, a plan records it. Every method is a collective.

    facts: what is known of the run without any work.
    teachers: the teachers that are ready, by name; a lab adds to them.
    results, record: the results of the finished stages, in order, and those of the method.
    """

    facts: RunFacts
    teachers: dict[str, ReadyTeacher]
    results: list[StageResult]
    record: MethodRecord

    def train(self, stage: Stage, files: Files) -> StageResult:
        """Run a stage whose options are all set, or return its result if it has finished before."""
        ...

    def model(self, folder: Path, role: str) -> ModelSource:
        """Return the model that a stage wrote; messages name the config's section of `role`."""
        ...

    def read_file(self, result: StageResult, name: str, read: Callable[[str], T]) -> T | None:
        """Read one of the `files` of a stage; None if nothing was trained."""
        ...

    def score(self, teacher: str) -> Mapping[str, float]:
        """Return the metrics of a teacher on the validation split, measured once."""
        ...

    def unit_scores(self, teacher: str) -> SortedTeacher:
        """Sort the units of a teacher by importance, measured once on the validation rows."""
        ...

    def layer_scores(self, teacher: str) -> tuple[float, ...]:
        """Return the importance of each layer of a teacher, which is measured once.

        The importance is the rise of the loss on held-out rows if the layer is left out.
        """
        ...

    def times(
        self, source: ModelSource, views: Mapping[str, View], name: str
    ) -> Mapping[str, float]:
        """Return the time of a forward of each view, relative to the whole model's; measured once.

        The views are built with random weights, and timed on the device of the run with the most
        texts at a time of the report. `name` is that of the stage that keeps the times.
        """
        ...

    def cut(self, source: ModelSource, view: View, name: str) -> ModelSource:
        """Cut a model to a view, without training, into `stages/<name>`."""
        ...

    def probe(self, stage: str) -> Any:
        """Return the `training.evaluation.StageProbe` of a stage; None if nothing is trained."""
        ...


W = TypeVar("W", bound=Work)


class Lab(Generic[W]):
    """The stages of one run config, as its method asks for them.

    work: what trains, scores and cuts, or records it.
    facts: what is known without any work: sizes of cut models, rows, steps and the metric.
    results, record: the results of the finished stages, in order, and those of the method.
    """

    def __init__(self, work: W) -> None:
        self.work, self.facts = work, work.facts
        self.config = work.facts.config
        self.results, self.record = work.results, work.record

    def hard_terms(self, weight: float = 1.0, *, per_row: bool = False) -> tuple[TermConfig, ...]:
        """Return the loss on labels for the type of the task; see `terms.hard_terms`."""
        return hard_terms(self.config.task.type, weight, per_row=per_row)

    def soft_terms(self, weight: float = 1.0) -> tuple[TermConfig, ...]:
        """Return the loss on the teacher's outputs for the type of the task."""
        return soft_terms(self.config.task.type, weight)

    def teacher(self, name: str | None = None) -> str:
        """Fine-tune a teacher if the config asks for it; return its name. None: the only one."""
        name = name or TEACHER
        if name not in self.work.teachers:
            spec, source = self.config.teacher_specs[name], self.configured_model(name)
            if spec.finetune is not None:
                objective = label_terms(self.config, smoothed=False)
                stage = Stage(
                    name=f"{name}-finetune",
                    meaning="the teacher, trained on the labels before it teaches",
                    learners={name: 1.0},
                    objective=objective,
                )
                source = self.work.model(self.train(stage).folder, name)
            self._register(name, source, spec)
        return name

    def as_teacher(self, result: StageResult) -> str:
        """Register a stage's model as a teacher, and return the stage's name.

        It has the engine and dtype of the only teacher of the config.
        """
        # A cache holds the answers of the configured teacher, not those of another model.
        spec = replace(self.config.teacher_specs[TEACHER], cache=None)
        self._register(result.name, self.work.model(result.folder, TEACHER), spec)
        return result.name

    def _register(self, name: str, source: ModelSource, spec: TeacherConfig) -> None:
        from megakd.models.fitting import ReadyTeacher

        self.work.teachers[name] = ReadyTeacher(source, spec)

    def assistant(self, result: StageResult, sparsity: float | None) -> str:
        """Register a stage's model as a teacher, and report it as an assistant.

        `sparsity`: share of the teacher's units that the model lacks; None if it was not cut.
        """
        self.record.assistants.append(Assistant(result.name, sparsity, result.folder))
        return self.as_teacher(result)

    def configured_model(self, role: str) -> ModelSource:
        """Return the model that the config names for a role, before any training."""
        return self.facts.sources[role]

    def model(self, teacher: str) -> ModelSource:
        """Return the model of a teacher that is ready, for a student that starts as its teacher."""
        return self.work.teachers[teacher].source

    def source(self, folder: Path) -> ModelSource:
        """Return the model in the folder of a stage."""
        return self.work.model(folder, STUDENT)

    def train(self, stage: Stage, files: Files = dict) -> StageResult:
        """Run a stage, or return its result if the stage has finished before; a collective.

        `files` is called after the last step. It returns small files by name, which are written
        beside the model in the stage's folder.

        Raises:
            MegakdError: bad input, a loss that is not finite, or a checkpoint of another config.
        """
        stage = with_defaults(stage, self.config)
        if stage.start is None and stage.role == STUDENT:
            stage = replace(stage, start=self._start())
        result = self.work.train(stage, files)
        self.results.append(result)
        return result

    def _start(self) -> ModelSource | None:
        # The layers of the teacher, as it teaches, that the student keeps, if it does.
        role = self.config.start_role
        if role == STUDENT or self.config.student.layers is None:
            return None
        from megakd.models.layers import as_student

        teacher = self.teacher(role)
        scores = self.work.layer_scores(teacher) if self.config.ranks_layers else None
        start = as_student(self.model(teacher), self.config, scores)
        self.record.layers = start.layers
        return start

    def dev_score(self, name: str) -> float:
        """Return the worth of the main metric of a teacher on the validation split.

        See `Metric.worth`.
        """
        return self.facts.metric(weighed=False).worth(self.work.score(name))


def baseline_stage(lab: Lab, name: str, student: StageResult) -> Stage:
    """Return the stage of a baseline that the config lists; methods define all but `alone`."""
    config = lab.config
    if name != "alone":
        return file_of(config.method).BASELINES[name](config.method, lab, student)
    # A student that was cut out of its teacher has no weights of its own at the start, so its shape
    # starts from random weights. One made of layers of a model starts from these layers again.
    is_cut = config.student.model == FROM_TEACHER and config.student.layers is None
    return Stage(
        name="alone",
        meaning="the student's start or shape, trained on the labels without a teacher",
        objective=label_terms(config),
        start=lab.source(student.folder).fresh if is_cut else None,
        train=inherit(config.train, config.alone) if config.alone else None,
    )


def label_terms(config: RunConfig, *, smoothed: bool = True) -> tuple[TermConfig, ...]:
    """Return the loss on labels alone, with the options that the objective gives to this term.

    Teachers are trained without smoothing: the outputs of a smoothed teacher say less about the
    similarity of labels (Mueller et al. 2019).
    """
    terms = [t for t in config.objective or () if isinstance(t, HardCrossEntropy)]
    if not terms:
        return hard_terms(config.task.type)
    # These stages train on the data: a term on generated texts would be 0 at every step.
    term = replace(terms[0], weight=1.0, on=None)
    return (term if smoothed else replace(term, label_smoothing=0.0),)


def with_defaults(stage: Stage, config: RunConfig) -> Stage:
    """Return a stage with unset options taken from the sections of the run.

    A teacher that learns, from any source, uses its `finetune` section if it is set.
    """
    teacher = config.teacher_specs.get(stage.role)
    finetune = teacher.finetune if teacher else None
    train = stage.train or (inherit(config.train, finetune) if finetune else config.train)
    objective = tuple(
        replace(term, class_weights=train.class_weights)
        if isinstance(term, HardCrossEntropy) and term.class_weights is None
        else term
        for term in stage.objective
    )
    measured = stage.measured
    if config.eval.losses and not (measured or stage.views):
        # Weights chosen by outputs are decisions of a step, and held-out rows decide nothing.
        measured = tuple(replace(one, weigh=None) for one in stage.strategy.passes(0))
    return replace(stage, objective=objective, train=train, measured=measured)
