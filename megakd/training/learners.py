"""The models that learn in a stage, their losses, and the engine that trains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megakd.config.deepspeed import load_ds_config
from megakd.config.run import RunConfig
from megakd.config.sections import StudentConfig
from megakd.config.task import STUDENT
from megakd.engine.collectives import activity
from megakd.engine.initialize import training_engine
from megakd.losses.bundle import StudentBundle, build_bundle
from megakd.losses.objective import StageLosses, stage_losses, with_class_weights
from megakd.models.fitting import ModelSource, ReadyTeacher
from megakd.models.lora import add_adapters
from megakd.models.second_vocabulary import SecondSize, add_second_vocabulary
from megakd.process.clock import phase
from megakd.process.seeding import cpu_seeded
from megakd.stage import Stage
from megakd.training.assembly import Assembly
from megakd.training.precision import (
    TORCH_DTYPE,
    check_dtype,
    check_kernels,
    choice_of,
    training_dtype,
)
from megakd.training.student import StudentEngine


def learning_models(
    stage: Stage,
    sources: Mapping[str, ModelSource],
    teachers: Mapping[str, ReadyTeacher],
    student: StudentConfig,
) -> dict[str, ModelSource]:
    """Return the models that learn in a stage, by role; ready `teachers` replace `sources`.

    The first is the stage's own model.
    """
    known = {**sources, **{name: teacher.source for name, teacher in teachers.items()}}
    learners = {role: known[role] for role in stage.beside}
    learners = {stage.role: stage.start or known[stage.role], **learners}
    if STUDENT in learners:
        learners[STUDENT] = learners[STUDENT].with_dropout(student.dropout)
    return learners


def learner_sources(assembly: Assembly, stage: Stage) -> dict[str, ModelSource]:
    """Return the models that learn in a stage, by role; the first is the stage's own model."""
    sources, student = assembly.prepared.sources, assembly.config.student
    return learning_models(stage, sources, assembly.teachers, student)


def losses_for(assembly: Assembly, stage: Stage) -> StageLosses:
    """Return the losses of a stage for the models that learn and answer in it."""
    terms = with_class_weights(stage.objective, assembly.prepared.splits)
    return stage_losses(
        replace(stage, objective=terms),
        assembly.config.task.type,
        learners=learner_sources(assembly, stage),
        teachers=[assembly.teachers[name].source for name in stage.models],
        classes=assembly.prepared.classes,
    )


@phase("models")
@activity("loading a model")
def student_engine(assembly: Assembly, stage: Stage) -> tuple[StudentEngine, StudentBundle]:
    """Return the engine of the models that learn in this stage, and the bundle in it."""
    losses = losses_for(assembly, stage)
    losses.check()  # before anything is loaded
    ranks, device_type = assembly.ranks, assembly.ranks.device.type
    ds = learner_ds(stage, assembly.config, ranks=ranks.world_size, device=device_type)
    dtype = training_dtype(stage.train, assembly.ranks.device.type)
    check_dtype(dtype, assembly.ranks, "train")
    check_kernels(stage.train.kernels, assembly.ranks, "train")
    sources = learner_sources(assembly, stage)
    models = {
        role: assembly.load(source, ds, dtype, need_head=False, fused=choice_of(stage))
        for role, source in sources.items()
    }
    pair = assembly.prepared.pair
    for role, share in assembly.config.method.mixed(stage).items():
        if share and pair is not None:
            size, kind = SecondSize(len(pair.student), pair.offset), TORCH_DTYPE[dtype]
            model, seed = models[role], assembly.config.seed
            add_second_vocabulary(model, size, ds=ds, dtype=kind, seed=seed)
    lora = assembly.config.lora_of(stage.role)
    if lora is not None:
        learner, source = models[stage.role], sources[stage.role]
        add_adapters(learner, source, assembly.config.task, lora, seed=assembly.config.seed)
    # Projections start equal on every rank and do not change the stage's random numbers.
    with cpu_seeded(assembly.config.seed):
        bundle = build_bundle(
            losses,
            models,
            dtype=TORCH_DTYPE[dtype],
            world_size=assembly.ranks.world_size,
            kernels=stage.train.kernels,
        )
    engine = training_engine(
        bundle,
        ds=ds,
        train=stage.train,
        dtype=dtype,
        rates=bundle.rates(stage.learners),
    )
    return StudentEngine(engine), bundle


def learner_ds(stage: Stage, config: RunConfig, *, ranks: int, device: str) -> dict[str, Any]:
    """Return the DeepSpeed config of what learns in a stage, whose options are all set."""
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
