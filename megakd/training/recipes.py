"""What runs and plans share of any method: the stages that a config asks for, and their lab."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.config.deepspeed import load_ds_config, zero_stage
from megakd.config.options import file_of
from megakd.config.run import RunConfig
from megakd.config.sections import inherit
from megakd.config.task import FROM_TEACHER, STUDENT, TEACHER
from megakd.config.terms import HardCrossEntropy, TermConfig, hard_terms
from megakd.models.fitting import ModelSource, ReadyTeacher
from megakd.stage import Stage, StageResult
from megakd.training.inputs import as_student
from megakd.training.lab import Assistant, Lab
from megakd.training.precision import training_dtype


def label_terms(config: RunConfig, *, smoothed: bool = True) -> tuple[TermConfig, ...]:
    """Return the loss on labels alone, with the options that the objective gives to this term.

    Teachers are trained without smoothing: the outputs of a smoothed teacher say less about the
    similarity of labels (Mueller et al. 2019).
    """
    terms = [t for t in config.objective or () if isinstance(t, HardCrossEntropy)]
    if not terms:
        return hard_terms(config.task.type)
    # These stages train on the data: a term on generated texts would be 0 at every step.
    term = dataclasses.replace(terms[0], weight=1.0, on=None)
    return (term if smoothed else dataclasses.replace(term, label_smoothing=0.0),)


def learner_ds(stage: Stage, config: RunConfig, *, ranks: int, device: str) -> dict[str, Any]:
    """Return the DeepSpeed config of the models that learn in a completed stage."""
    teacher, train = config.teacher_specs.get(stage.role), stage.train
    deepspeed = ((teacher and teacher.finetune) or config.student).deepspeed
    if deepspeed == "auto" and ranks == 1:
        # ZeRO 2, which `auto` is else, only copies there. In 16 bits ZeRO 2 adds up gradients in
        # fp32, and ZeRO 0 does not. ZeRO 0 in 16 bits was measured on a CPU alone, without views.
        is_split = train.gradient_accumulation_steps > 1 or train.tokens_per_rank is not None
        is_measured = device == "cpu" and not stage.views
        if training_dtype(train, device) == "fp32" or (is_measured and not is_split):
            deepspeed = "zero0"
    return load_ds_config(deepspeed, where="student.deepspeed")


def completed(stage: Stage, config: RunConfig) -> Stage:
    """Return a stage with unset options taken from the sections of the run.

    A teacher that learns, from any source, uses its `finetune` section if it is set.
    """
    teacher = config.teacher_specs.get(stage.role)
    finetune = teacher.finetune if teacher else None
    train = stage.train or (inherit(config.train, finetune) if finetune else config.train)
    objective = tuple(
        dataclasses.replace(term, class_weights=train.class_weights)
        if isinstance(term, HardCrossEntropy) and term.class_weights is None
        else term
        for term in stage.objective
    )
    measured = stage.measured
    if config.eval.losses and not (measured or stage.views):
        # Weights chosen by outputs are decisions of a step, and held-out rows decide nothing.
        measured = tuple(dataclasses.replace(one, weigh=None) for one in stage.strategy.passes(0))
    return dataclasses.replace(stage, objective=objective, train=train, measured=measured)


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
        objective=label_terms(config),
        start=lab.source(student.folder).fresh if is_cut else None,
        train=inherit(config.train, config.alone) if config.alone else None,
    )


def scoring_preset(deepspeed: str | Mapping[str, Any]) -> str:
    """Return the preset for scoring a finished student: sharded if it was trained sharded."""
    ds = load_ds_config(deepspeed, where="student.deepspeed")
    return "teacher_zero3" if zero_stage(ds) == 3 else "teacher_zero0"


class LabBase(Lab):
    """The part of a lab that follows from the configs of the run and of its models."""

    config: RunConfig

    def __init__(self, config: RunConfig, sources: Mapping[str, ModelSource]) -> None:
        super().__init__(config)
        self._sources = sources
        self._teachers: dict[str, ReadyTeacher] = {}

    @abstractmethod
    def _source(self, folder: Path, role: str) -> ModelSource:
        """Return the model that a stage wrote; messages name the config's section of `role`."""

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

    def as_teacher(self, result: StageResult) -> str:
        # A cache holds the answers of the configured teacher, not those of another model.
        spec = dataclasses.replace(self.config.teacher_specs[TEACHER], cache=None)
        self._teachers[result.name] = ReadyTeacher(self._source(result.folder, TEACHER), spec)
        return result.name

    def assistant(self, result: StageResult, sparsity: float | None) -> str:
        self.record.assistants.append(Assistant(result.name, sparsity, result.folder))
        return self.as_teacher(result)

    def _completed(self, stage: Stage) -> Stage:
        stage = completed(stage, self.config)
        if stage.start is not None or stage.role != STUDENT:
            return stage
        return dataclasses.replace(stage, start=self._start())

    def _start(self) -> ModelSource | None:
        # The layers of the teacher, as it teaches, that the student keeps, if it does.
        role = self.config.start_role
        if role == STUDENT or self.config.student.layers is None:
            return None
        scores = self.pruning.layer_scores(self.teacher(role)) if self.config.ranks_layers else None
        start = as_student(self._teachers[self.teacher(role)].source, self.config, scores)
        self.record.layers = start.layers
        return start

    def given(self, role: str) -> ModelSource:
        return self._sources[role]

    def source(self, folder: Path) -> ModelSource:
        return self._source(folder, STUDENT)

    def model(self, teacher: str) -> ModelSource:
        return self._teachers[teacher].source
