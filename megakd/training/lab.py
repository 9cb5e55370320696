"""What a method is written against: the lab of a run, its results, and the metric that decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from megakd.config.options import file_of
from megakd.config.sections import inherit
from megakd.config.task import FROM_TEACHER, STUDENT, TEACHER
from megakd.config.terms import TermConfig, hard_terms, soft_terms
from megakd.errors import ConfigError
from megakd.plugins import is_metric, metric_of
from megakd.stage import Scores, Stage, StageResult, Verdict

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.config.sections import TeacherConfig
    from megakd.models.fitting import ModelSource, ReadyTeacher
    from megakd.models.views import ParameterCounts, View
    from megakd.training.allocation import SortedTeacher

Report = dict[str, Any]
"""The content of report.json: one flat mapping, see docs/report.md.

A number of a model has the key `NAME.NUMBER`, such as `student.accuracy`; `teacher` is the largest
teacher. Lists hold names, texts, or rows such as those of the stages.
"""


Row = dict[str, Any]
"""A row of a list of the report, such as a candidate of a trial or a label's scores."""


class Assistant(NamedTuple):
    """A teacher assistant: a model between the teacher and the student in size.

    sparsity: share of the teacher's units that the assistant lacks; None if it was not cut.
    """

    name: str
    sparsity: float | None
    folder: Path


@dataclass
class MethodRecord:
    """Results that a method adds to the report.

    candidates: what the method compared; all are scored in the same evaluation.
    asked: the size that the student was cut to: `what` (parameters, flops, speedup) and `value`.
    layers: the layers of the teacher that the student is made of; None: all, or none.
    pool: how often each of several teachers taught: `distribution`, and rows of `teachers`.
    pruning: the student of a method that prunes during training, at each evaluation.
    dev_scores: by name, the scores by which teachers were ranked.
    """

    candidates: list[Row] = field(default_factory=list)
    assistants: list[Assistant] = field(default_factory=list)
    asked: Row | None = None
    layers: tuple[int, ...] | None = None
    pool: Row | None = None
    pruning: list[Row] = field(default_factory=list)
    dev_scores: dict[str, float] = field(default_factory=dict)


LOWER_IS_BETTER = ("perplexity", "loss", "nats_per_character")

LOSSES = ("hard_", "soft_target_", "hidden_", "embedding_", "attention_", "relation_")
"""Beginnings of the names of loss terms, which an evaluation may report too."""


def lower_is_better(name: str) -> bool:
    """Return whether lower values of a metric are better; False if its package is missing."""
    if not is_metric(name):
        return name in LOWER_IS_BETTER or name.startswith(LOSSES)
    try:
        return not getattr(metric_of(name), "higher_is_better", True)
    except ConfigError:
        return False


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of an evaluation, and whether higher values are better."""

    name: str
    parts: tuple[str, ...]
    higher_is_better: bool

    def of(self, values: Mapping[str, float]) -> float:
        """Return the mean of the official metrics in `parts`."""
        return sum(values[part] for part in self.parts) / len(self.parts)

    def worth(self, values: Mapping[str, float]) -> float:
        """Return the mean, negated if lower values are better."""
        return self.of(values) if self.higher_is_better else -self.of(values)


WHOLE = "whole"
"""The key of the model itself where scores are kept by view."""


@dataclass(frozen=True)
class MetricJudge:
    """A judge that compares evaluations by one metric of one view, or of the model itself."""

    metric: Metric
    view: str = WHOLE

    def __call__(self, scores: Scores, step: int) -> Verdict:
        del step
        return Verdict(self.metric.worth(scores[self.view]), self.view)


T = TypeVar("T")

Files = Callable[[], Mapping[str, bytes]]

Model = Any
"""A model that a stage can start from. A method passes the model on and never opens it.

It has the attributes `depth` (number of layers), `heads` (`Heads`), `width` (of the hidden states),
`units` (`View`; `head_width` is set if columns of heads can be cut), `uncut` (why only whole layers
can be left out, or None), `shows_attention` (attentions can be read), `whole` (`View` of all that
can be left out) and `fresh` (the model of the same shape that starts from random weights).
"""


class Pruning(ABC):
    """Sizes, importance and cuts of models."""

    @abstractmethod
    def unscored(self) -> SortedTeacher:
        """Return the teacher with equal importance for all units, before the teacher is trained."""

    @abstractmethod
    def sorted_teacher(self, teacher: str) -> SortedTeacher:
        """Sort the units of a teacher by importance, measured once on the validation rows."""

    @abstractmethod
    def layer_scores(self, teacher: str) -> tuple[float, ...]:
        """Return the importance of each layer of a teacher, which is measured once.

        The importance is the rise of the loss on held-out rows if the layer is left out.
        """

    @abstractmethod
    def why_rigid(self, source: Model) -> str | None:
        """Return the reason why hidden states cannot lose columns; None: they can."""

    @abstractmethod
    def has_stock_config(self, source: Model, view: View) -> bool:
        """Return whether transformers' own class of the family can have the shape of a cut."""

    @abstractmethod
    def check_layers(self, source: Model, view: View) -> None:
        """Raise if the layers of a view would not compute alone what they compute in the model."""

    @abstractmethod
    def cut(self, source: Model, view: View, name: str) -> Model:
        """Cut a model to a view, without training, into `stages/<name>`."""

    @abstractmethod
    def parameters(self, source: Model, view: View) -> ParameterCounts:
        """Return the number of weights of a view."""

    @abstractmethod
    def relative_times(
        self, source: Model, views: Mapping[str, View], name: str
    ) -> Mapping[str, float]:
        """Return the time of a forward of each view, relative to the whole model's; measured once.

        The views are built with random weights, and timed on the device of the run with the most
        texts at a time of the report. `name` is that of the stage that keeps the times.
        """


class Lab(ABC):
    """Run or plan the stages of one run config.

    sources: the models of the config by role.
    assembly: the parts that the engines of all stages are built from; None in a plan.
    results: the results of the finished stages, in order.
    record: further results that a method reports.
    """

    def __init__(self, config: RunConfig, sources: Mapping[str, ModelSource]) -> None:
        self.config, self._sources = config, sources
        self.results: list[StageResult] = []
        self.record = MethodRecord()
        self.assembly: Any = None
        self._teachers: dict[str, ReadyTeacher] = {}

    @property
    @abstractmethod
    def pruning(self) -> Pruning:
        """The tools of methods that cut models."""

    def hard_terms(self, weight: float = 1.0, *, per_row: bool = False) -> tuple[TermConfig, ...]:
        """Return the loss on labels for the type of the task; see `terms.hard_terms`."""
        return hard_terms(self.config.task.type, weight, per_row=per_row)

    def soft_terms(self, weight: float = 1.0) -> tuple[TermConfig, ...]:
        """Return the loss on the teacher's outputs for the type of the task."""
        return soft_terms(self.config.task.type, weight)

    def teacher(self, name: str | None = None) -> str:
        """Fine-tune a teacher if the config asks for it; return its name. None: the only one."""
        from megakd.training.recipes import label_terms

        name = name or TEACHER
        if name not in self._teachers:
            spec, source = self.config.teacher_specs[name], self._sources[name]
            if spec.finetune is not None:
                objective = label_terms(self.config, smoothed=False)
                stage = Stage(name=f"{name}-finetune", learners={name: 1.0}, objective=objective)
                source = self._source(self.train(stage).folder, name)
            self._register(name, source, spec)
        return name

    def as_teacher(self, result: StageResult) -> str:
        """Register a stage's model as a teacher, and return the stage's name.

        It has the engine and dtype of the only teacher of the config.
        """
        # A cache holds the answers of the configured teacher, not those of another model.
        spec = replace(self.config.teacher_specs[TEACHER], cache=None)
        self._register(result.name, self._source(result.folder, TEACHER), spec)
        return result.name

    def _register(self, name: str, source: ModelSource, spec: TeacherConfig) -> None:
        from megakd.models.fitting import ReadyTeacher

        self._teachers[name] = ReadyTeacher(source, spec)

    def assistant(self, result: StageResult, sparsity: float | None) -> str:
        """Register a stage's model as a teacher, and report it as an assistant.

        `sparsity`: share of the teacher's units that the model lacks; None if it was not cut.
        """
        self.record.assistants.append(Assistant(result.name, sparsity, result.folder))
        return self.as_teacher(result)

    def given(self, role: str) -> ModelSource:
        """Return the model that the config gives for a role, before any training."""
        return self._sources[role]

    def model(self, teacher: str) -> ModelSource:
        """Return the model of a teacher that is ready, for a student that starts as its teacher."""
        return self._teachers[teacher].source

    def source(self, folder: Path) -> ModelSource:
        """Return the model in the folder of a stage."""
        return self._source(folder, STUDENT)

    @abstractmethod
    def _source(self, folder: Path, role: str) -> ModelSource:
        """Return the model that a stage wrote; messages name the config's section of `role`."""

    @abstractmethod
    def train(self, stage: Stage, files: Files = dict) -> StageResult:
        """Run a stage, or return its result if the stage has finished before; a collective.

        `files` is called after the last step. It returns small files by name, which are written
        beside the model in the stage's folder.

        Raises:
            MegakdError: bad input, a loss that is not finite, or a checkpoint of another config.
        """

    def _completed(self, stage: Stage) -> Stage:
        from megakd.training.recipes import completed

        stage = completed(stage, self.config)
        if stage.start is None and stage.role == STUDENT:
            return replace(stage, start=self._start())
        return stage

    def _start(self) -> ModelSource | None:
        # The layers of the teacher, as it teaches, that the student keeps, if it does.
        role = self.config.start_role
        if role == STUDENT or self.config.student.layers is None:
            return None
        from megakd.training.recipes import as_student

        scores = self.pruning.layer_scores(self.teacher(role)) if self.config.ranks_layers else None
        start = as_student(self._teachers[self.teacher(role)].source, self.config, scores)
        self.record.layers = start.layers
        return start

    @abstractmethod
    def dev_score(self, name: str) -> float:
        """Return the worth of the main metric of a teacher on the validation split, measured once.

        See `Metric.worth`.
        """

    @abstractmethod
    def rows_of_teachers(self) -> dict[str, int]:
        """Return the number of training rows that name each teacher of the config."""

    @abstractmethod
    def steps_of_student(self) -> int:
        """Return the number of optimizer steps in `train` if all rows are used."""

    @abstractmethod
    def metric(self, *, weighed: bool = True) -> Metric:
        """Return the metric that ranks evaluations.

        Raises:
            ConfigError: the metric is `weighed` against sparsity, and is not between 0 and 1.
        """

    def probe(self, stage: str) -> Any:
        """Return the `training.evaluation.StageProbe` of a stage; None if nothing is trained."""
        return self.assembly and self.assembly.probe(stage)

    @abstractmethod
    def made_by(self, result: StageResult, name: str, read: Callable[[str], T]) -> T | None:
        """Read one of the `files` of a stage; None if nothing was trained."""


def baseline_stage(lab: Lab, name: str, student: StageResult) -> Stage:
    """Return the stage of a baseline that the config lists; methods define all but `alone`."""
    from megakd.training.recipes import label_terms

    config = lab.config
    if name != "alone":
        return file_of(config.method).BASELINES[name](config.method, lab, student)
    # A student that was cut out of its teacher has no weights of its own at the start, so its shape
    # starts from random weights. One made of layers of a model starts from these layers again.
    is_cut = config.student.model == FROM_TEACHER and config.student.layers is None
    return Stage(
        name="alone",
        objective=label_terms(config),
        start=lab.source(student.folder).fresh if is_cut else None,
        train=inherit(config.train, config.alone) if config.alone else None,
    )
