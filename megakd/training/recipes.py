"""The stages that a run config itself asks for, whatever its method, and what they inherit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megakd.config.deepspeed import load_ds_config, zero_stage
from megakd.config.run import RunConfig, inherit
from megakd.contract.stage import Stage, StageResult
from megakd.contract.tasks import FROM_TEACHER
from megakd.contract.terms import HardCrossEntropy, TermConfig, hard_terms
from megakd.methods import file_of

if TYPE_CHECKING:
    from megakd.contract.lab import Lab


def finetuning_stage(config: RunConfig, name: str) -> Stage | None:
    """How a teacher is fine-tuned; None where the config does not ask for it.

    Args:
        config: the run.
        name: the teacher's.
    """
    if config.teacher_specs[name].finetune is None:
        return None
    return Stage(
        name=f"{name}-finetune",
        role=name,
        objective=label_terms(config, smoothed=False),
        labelled_only=True,
    )


def label_terms(config: RunConfig, *, smoothed: bool = True) -> tuple[TermConfig, ...]:
    """Return the loss on labels alone, with the options that the objective gives to this term.

    Args:
        config: the run.
        smoothed: keep the label smoothing. A teacher does without: a smoothed teacher says less of
            how alike the labels are (Mueller et al. 2019).
    """
    given = [t for t in config.objective or () if isinstance(t, HardCrossEntropy)]
    if not given:
        return hard_terms(config.task.type)
    kept = dataclasses.replace(given[0], weight=1.0)
    return (kept if smoothed else dataclasses.replace(kept, label_smoothing=0.0),)


def completed(stage: Stage, config: RunConfig) -> Stage:
    """A stage with what the run's sections say where it says nothing itself.

    A teacher that learns, whoever it learns from, does as its `finetune` says where it is there.
    """
    teacher = config.teacher_specs.get(stage.role)
    finetune = teacher.finetune if teacher else None
    train = inherit(config.train, finetune) if finetune else config.train
    deepspeed = finetune.deepspeed if finetune else config.student.deepspeed
    return dataclasses.replace(
        stage, train=stage.train or train, deepspeed=stage.deepspeed or deepspeed
    )


def baseline_stage(lab: Lab, name: str, student: StageResult) -> Stage:
    """Return the stage of a baseline that the config lists; the method builds its own ones."""
    if name == "alone":
        return _alone(lab, student)
    method = lab.config.method
    return file_of(method).BASELINES[name](method, lab, student)


def _alone(lab: Lab, student: StageResult) -> Stage:
    """The same student, trained on the labels alone as `train` says, or `alone` where it does.

    One that was cut out of its teacher has no weights of its own to begin with: its shape starts
    from random ones. One that has some of its layers starts from those again.
    """
    config = lab.config
    is_cut = config.student.model == FROM_TEACHER and config.student.layers is None
    return Stage(
        name="alone",
        objective=label_terms(config),
        labelled_only=True,
        start=lab.fresh_like(student.folder) if is_cut else None,
        train=inherit(config.train, config.alone) if config.alone else None,
    )


def scoring_preset(deepspeed: str | Mapping[str, Any]) -> str:
    """Return how a finished student is held while it is scored: sharded if it was trained so."""
    ds = load_ds_config(deepspeed, where="student.deepspeed")
    return "teacher_zero3" if zero_stage(ds) == 3 else "teacher_zero0"
