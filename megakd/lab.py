"""Where a method's stages are run: engines, data, evaluation, and what is finished already."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from megakd.assembly import Assembly, check_dtype, check_kernels, training_dtype
from megakd.config import FROM_TEACHER, Dtype, RunConfig, TrainConfig, TrainOverrides
from megakd.config_file import config_tree
from megakd.engine.distributed import Ranks, main_first
from megakd.engine.ds_config import load_ds_config, zero_stage
from megakd.errors import CheckpointError
from megakd.evaluation import Metric, weighable
from megakd.fingerprint import Fingerprint, files_identity, flatten
from megakd.knowledge import Needs
from megakd.models.loading import ModelSource, resolve_model
from megakd.models.units import View
from megakd.objective import teacher_needs
from megakd.preparation import Prepared
from megakd.progress import Reporter
from megakd.pruning import Specification, Workshop, unscored
from megakd.report import (
    CandidateReport,
    CostReport,
    ModelReport,
    ParameterCounts,
    named_shapes,
    parameter_counts,
)
from megakd.stage import Stage, StageResult
from megakd.stage_run import StageRun, read_result
from megakd.teachers.frozen import FrozenTeacher
from megakd.terms import TermConfig, hard_terms, soft_terms

logger = logging.getLogger(__name__)
TEACHER_STAGE = "teacher-finetune"


class Assistant(NamedTuple):
    """A model between teacher and student."""

    name: str
    sparsity: float
    folder: Path


@dataclass
class MethodRecord:
    """What a method wants to be reported: candidates it weighed, assistants it used, its cost."""

    candidates: list[CandidateReport] = field(default_factory=list)
    assistants: list[Assistant] = field(default_factory=list)
    cost: CostReport | None = None


class Lab:
    """Runs the stages of one run config, each once.

    config: the run.
    results: the stages that have finished, in order.
    record: what a method wants to be reported beside them.
    """

    def __init__(
        self, config: RunConfig, prepared: Prepared, ranks: Ranks, reporter: Reporter
    ) -> None:
        self.config = config
        self.results: list[StageResult] = []
        self._prepared, self._ranks, self._reporter = prepared, ranks, reporter
        self.record = MethodRecord()
        self._teachers: dict[str, ModelSource] = {}
        self._assembly = Assembly(
            config=config, prepared=prepared, ranks=ranks, teachers=self._teachers
        )
        self._workshop = Workshop(assembly=self._assembly, stages=config.output_dir / "stages")

    def hard_terms(self, weight: float = 1.0) -> tuple[TermConfig, ...]:
        """The loss on labels that fits the task."""
        return hard_terms(self.config.task.type, weight)

    def soft_terms(self, weight: float = 1.0) -> tuple[TermConfig, ...]:
        """The loss on the teacher's outputs that fits the task."""
        return soft_terms(self.config.task.type, weight)

    def teacher(self) -> str:
        """The teacher's name, after fine-tuning it if the config says so."""
        if "teacher" not in self._teachers:
            self._teachers["teacher"] = self._ready_teacher()
        return "teacher"

    def _ready_teacher(self) -> ModelSource:
        stage = teacher_stage(self.config)
        if stage is None:
            return self._prepared.sources["teacher"]
        return self._source(self.train(stage).folder, "teacher")

    @property
    def teacher_layers(self) -> int:
        """How many layers the teacher has."""
        return self._prepared.shape("teacher").layers

    def metric(self, name: str | None) -> Metric:
        """A metric of the task that can be weighed against sparsity; None: the one it stands for.

        Raises:
            ConfigError: the task has no such metric, or it is no fraction of what can be had.
        """
        return weighable(name, self._prepared.splits.metrics)

    def unscored(self) -> Specification:
        """The teacher's units, all alike: what can be cut is known before it is trained."""
        return unscored(self._prepared.sources["teacher"])

    def specify(self, teacher: str, split: str, *, residual: bool) -> Specification:
        """The teacher with its units sorted by importance; measured once.

        Args:
            teacher: its name.
            split: whose labels say what is important.
            residual: whether the columns of the hidden states are units too.

        Raises:
            MegakdError: its importance cannot be measured.
        """
        spec, source = self.config.teacher, self._teachers[teacher]
        result = self._workshop.sorted_teacher(
            source,
            split=split,
            residual=residual,
            deepspeed=spec.deepspeed if spec else "teacher_zero3",
            identity=_identity(source),
        )
        self.results.append(result)
        return Specification(
            source=self.source(result.folder), scores=self._workshop.scores(result.folder)
        )

    def cut(self, source: ModelSource, view: View, name: str) -> ModelSource:
        """A model cut to a view, in `stages/<name>`, not trained; itself where that is all."""
        units = source.architecture.units(source.config)
        if view._replace(width=view.width or units.width) == units:
            return source
        result = self._workshop.cut(source, view, name, identity=_identity(source))
        return self.source(result.folder)

    def parameters(self, source: ModelSource, view: View) -> ParameterCounts:
        """How many weights a view of a model has."""
        return self._workshop.parameters(source, view)

    def as_teacher(self, result: StageResult) -> str:
        """Makes a stage's model a teacher, by the stage's name."""
        self._teachers[result.name] = self._source(result.folder, "teacher")
        return result.name

    def assistant(self, result: StageResult, sparsity: float) -> str:
        """Makes a stage's model the teacher of the student, which the report shows."""
        self.record.assistants.append(Assistant(result.name, sparsity, result.folder))
        return self.as_teacher(result)

    def fresh_like(self, folder: Path) -> ModelSource:
        """A model of the same shape that starts from random weights."""
        return dataclasses.replace(self.source(folder), folder=None, stored={})

    def train(self, stage: Stage) -> StageResult:
        """Runs a stage, or takes its result if it has finished before; a collective.

        Raises:
            MegakdError: bad input, a loss that is not finite, or a checkpoint of another config.
        """
        stage = completed(stage, self.config)
        fingerprint = self._fingerprint(stage)
        folder = self.config.output_dir / "stages" / stage.name
        result = read_result(folder, fingerprint)
        if result is not None:
            logger.info("%s: finished before, taken from %s", stage.name, folder)
        else:
            result = self._run(stage, fingerprint, folder)
        self.results.append(result)
        return result

    def _run(self, stage: Stage, fingerprint: Fingerprint, folder: Path) -> StageResult:
        teachers = {name: self._frozen(name, self.needs(stage)) for name in stage.teachers}
        run = StageRun(
            stage,
            self._assembly,
            teachers=teachers,
            reporter=self._reporter,
            fingerprint=fingerprint,
        )
        try:
            return run.run(folder)
        finally:
            run.close()
            for teacher in teachers.values():
                teacher.destroy()

    def needs(self, stage: Stage) -> Needs:
        """What a stage's losses ask of its teacher."""
        student, teacher = self._assembly.shapes(stage)
        return Needs() if teacher is None else teacher_needs(stage.objective, student, teacher)

    def _frozen(self, name: str, needs: Needs) -> FrozenTeacher:
        spec, source = self.config.teacher, self._teachers[name]
        if spec is None:
            raise TypeError(f"{name} is planned and the config has no teacher")
        dtype = self._assembly.teacher_dtype(source)
        return self._assembly.frozen(source, spec.deepspeed, dtype=dtype, needs=needs)

    def _fingerprint(self, stage: Stage) -> Fingerprint:
        """All that the stage's weights depend on, except the number of ranks."""
        tree: dict[str, Any] = {
            "seed": self.config.seed,
            "task": config_tree(self.config)["task"],
            "data": self._prepared.encoded.content_hash,
            "model": _identity(self._assembly.learner(stage)),
            "train": _train_identity(stage.train),
            "objective": [asdict(term) for term in stage.objective],
            "deepspeed": load_ds_config(stage.deepspeed, where=f"{stage.role}.deepspeed"),
            "labelled_only": stage.labelled_only,
            "strategy": _plain(stage.strategy),
            "views": {name: view._asdict() for name, view in stage.views.items()},
            "judge": _plain(stage.judge),
            "eval": {k: v for k, v in asdict(self.config.eval).items() if "batch" not in k},
        }
        for name in stage.teachers:
            source = self._teachers[name]
            dtype = self._assembly.teacher_dtype(source)
            tree[name] = {"model": _identity(source), "dtype": dtype}
        return flatten(tree)

    def source(self, folder: Path) -> ModelSource:
        """A finished folder as a model to load."""
        return self._source(folder, "student")

    def _source(self, folder: Path, role: str) -> ModelSource:
        return main_first(
            lambda: resolve_model(str(folder), self.config.task, where=f"{role}.model")
        )

    @property
    def has_teacher(self) -> bool:
        """Whether a method has asked for the teacher."""
        return "teacher" in self._teachers

    @property
    def teacher_folder(self) -> Path | None:
        """Where the teacher's weights are, fine-tuned or given."""
        return self._teachers["teacher"].folder if self.has_teacher else None

    def score_teacher(self) -> ModelReport:
        """The teacher's size and its metrics on the split that the report is about."""
        spec = self.config.teacher
        source = self._teachers["teacher"]
        preset = spec.deepspeed if spec else "teacher_zero3"
        return self.score(source, preset, self._assembly.teacher_dtype(source))

    def score(
        self, source: ModelSource, deepspeed: str | Mapping[str, Any], dtype: Dtype = "fp32"
    ) -> ModelReport:
        """Size and metrics of a model on `held_out`; a collective."""
        model = self._assembly.frozen(source, deepspeed, dtype=dtype, needs=Needs())
        try:
            metrics = self._assembly.scorer().score(model.predict, self.held_out)
            counts = parameter_counts(named_shapes(model.model))
        finally:
            model.destroy()
        return {
            "parameters": counts.parameters,
            "encoder_parameters": counts.encoder_parameters,
            "metrics": metrics,
        }

    @property
    def held_out(self) -> Dataset:
        """The split that the report's metrics are about."""
        encoded = self._prepared.encoded
        return encoded.test if encoded.test is not None else encoded.validation


def teacher_stage(config: RunConfig) -> Stage | None:
    """How the teacher is fine-tuned; None where the config does not ask for it."""
    finetune = config.teacher.finetune if config.teacher else None
    if finetune is None:
        return None
    return Stage(
        name=TEACHER_STAGE,
        role="teacher",
        objective=hard_terms(config.task.type),
        train=inherit(config.train, finetune),
        deepspeed=finetune.deepspeed,
        labelled_only=True,
    )


def completed(stage: Stage, config: RunConfig) -> Stage:
    """A stage with what the run's sections say where it says nothing itself."""
    return dataclasses.replace(
        stage,
        train=stage.train or config.train,
        deepspeed=stage.deepspeed or config.student.deepspeed,
    )


def baseline_stage(lab: Lab, name: str, student: StageResult) -> Stage:
    """The same student, trained on the labels alone as `train` says, or `alone` where it does.

    One that was cut out of its teacher has no weights of its own to begin with: its shape starts
    from random ones.
    """
    config = lab.config
    is_cut = config.student.model == FROM_TEACHER
    return Stage(
        name=name,
        objective=lab.hard_terms(),
        labelled_only=True,
        start=lab.fresh_like(student.folder) if is_cut else None,
        train=inherit(config.train, config.alone) if config.alone else None,
    )


def inherit(train: TrainConfig, overrides: TrainOverrides) -> TrainConfig:
    """The keys that `teacher.finetune` or `alone` set, and `train`'s for the rest.

    `max_steps` and `num_train_epochs` displace each other, and so do `warmup_steps` and
    `warmup_ratio`: whoever is set there decides alone.
    """
    given = {k: v for k, v in asdict(overrides).items() if v is not None and k != "deepspeed"}
    if "num_train_epochs" in given and "max_steps" not in given:
        given["max_steps"] = None
    if "warmup_ratio" in given and "warmup_steps" not in given:
        given["warmup_steps"] = 0
    return dataclasses.replace(train, **given)


def scoring_preset(deepspeed: str | Mapping[str, Any]) -> str:
    """How a finished student is held while it is scored: sharded if it was trained so."""
    ds = load_ds_config(deepspeed, where="student.deepspeed")
    return "teacher_zero3" if zero_stage(ds) == 3 else "teacher_zero0"


def check_device(config: RunConfig, ranks: Ranks) -> None:
    """Refuses what the device cannot compute in or with, before a teacher is trained for nothing.

    Raises:
        ConfigError: naming the dtype and those the device has, or the kernels.
    """
    check_dtype(training_dtype(config.train), ranks, "train")
    check_kernels(config.train.kernels, ranks, "train")
    teacher = config.teacher
    if teacher is not None and teacher.dtype is not None:
        check_dtype(teacher.dtype, ranks, "teacher.dtype")
    if teacher is not None and teacher.finetune is not None:
        train = inherit(config.train, teacher.finetune)
        check_dtype(training_dtype(train), ranks, "teacher.finetune")
        check_kernels(train.kernels, ranks, "teacher.finetune")


def check_checkpoint_given(where: str, path: bool | str | None) -> None:  # noqa: FBT001
    """Refuses a checkpoint path that is not there.

    Raises:
        CheckpointError: it does not exist.
    """
    if isinstance(path, str) and not Path(path).is_dir():
        raise CheckpointError(
            f"{where}: {path} does not exist; give a folder such as "
            f"checkpoints/<stage>/step-<n>, or true for the newest"
        )


def _train_identity(train: TrainConfig) -> Mapping[str, Any]:
    """Without what may differ between two parts of one run: all kernels compute the same."""
    tree = asdict(train) | {"resume_from_checkpoint": None}
    del tree["kernels"]
    return tree


def _plain(value: Any) -> Any:
    """What a strategy or a judge is made of."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return None
    return {"kind": type(value).__name__, **asdict(value)}


def _identity(source: ModelSource) -> Mapping[str, Any]:
    files = sorted({stored.file for stored in source.stored.values()})
    return {"config": source.config.to_diff_dict(), "weights": files_identity(files)}
