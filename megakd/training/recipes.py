"""The stages that a config asks for, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megakd.config.deepspeed import load_ds_config, zero_stage
from megakd.config.run import RunConfig
from megakd.config.sections import KeptLayers, StudentConfig, TeacherConfig, inherit
from megakd.config.task import FP8
from megakd.config.terms import HardCrossEntropy, TermConfig, hard_terms
from megakd.models.fitting import ModelSource
from megakd.models.layers import with_layers
from megakd.stage import Stage
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
    term = replace(terms[0], weight=1.0, on=None)
    return (term if smoothed else replace(term, label_smoothing=0.0),)


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


def scoring_preset(deepspeed: str | Mapping[str, Any]) -> str:
    """Return the preset for scoring a finished student: sharded if it was trained sharded."""
    ds = load_ds_config(deepspeed, where="student.deepspeed")
    return "teacher_zero3" if zero_stage(ds) == 3 else "teacher_zero0"


def as_student(
    source: ModelSource, config: RunConfig, scores: Sequence[float] | None = None
) -> ModelSource:
    """Return the model that the student starts as, with the layers that the student keeps."""
    student = specified(replace(source, where="student.model"), config.student)
    layers = config.student.layers
    wanted = layers.keep if isinstance(layers, KeptLayers) else layers
    if wanted is None:
        return student
    return with_layers(student, wanted, where="student.layers", scores=scores)


def specified(source: ModelSource, spec: TeacherConfig | StudentConfig) -> ModelSource:
    """Return a model with the attention and, of a teacher, the 8 bits that its section asks for."""
    has_fp8 = isinstance(spec, TeacherConfig) and spec.dtype == FP8
    return replace(source, attn_implementation=spec.attn_implementation, fp8=has_fp8)
