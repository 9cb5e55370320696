"""Settings that a stage inherits from the run's sections, and its dtypes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.config.sections import (
    FinetuneOverrides,
    PooledTeacher,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    inherit,
)
from megakd.config.task import TaskConfig
from megakd.config.terms import HardCrossEntropy, SoftTargetKl
from megakd.methods.skdbert import SkdbertConfig
from megakd.models.views import View
from megakd.stage import Stage
from megakd.training import precision
from megakd.training.assembly import scoring_preset
from megakd.training.lab import with_defaults
from megakd.training.learners import learner_ds
from megakd.training.precision import frozen_dtype, say_precision, scoring_dtype, training_dtype

WARM = {"warmup_steps": 9, "warmup_ratio": 0.5}


@pytest.mark.parametrize(
    ("train", "overrides", "decides"),
    [
        ({"max_steps": 9}, {"num_train_epochs": 2.0}, {"max_steps": None, "num_train_epochs": 2.0}),
        # max_steps wins in a section.
        ({"num_train_epochs": 5.0}, {"max_steps": 7}, {"max_steps": 7, "num_train_epochs": 5.0}),
        (WARM, {"warmup_ratio": 0.1}, {"warmup_steps": 0, "warmup_ratio": 0.1}),
        (WARM, {"warmup_steps": 3}, {"warmup_steps": 3, "warmup_ratio": 0.5}),
        (WARM, {}, WARM),
    ],
)
def test_steps_and_shares_of_a_run_displace_each_other(train, overrides, decides):
    result = inherit(TrainConfig(**train), FinetuneOverrides(**overrides))

    assert {key: getattr(result, key) for key in decides} == decides


def two_teachers() -> RunConfig:
    finetune = FinetuneOverrides(max_steps=7, deepspeed="zero3")
    return RunConfig(
        output_dir=Path("out"),
        task=TaskConfig(type="classification", dataset="texts"),
        student=StudentConfig(model="student", deepspeed="zero1"),
        method=SkdbertConfig(name="skdbert"),
        teachers=(
            PooledTeacher(name="large", model="large"),
            PooledTeacher(name="small", model="small", finetune=finetune),
        ),
        train=TrainConfig(max_steps=9, learning_rate=0.5),
    )


def stage_of(role: str, config: RunConfig) -> Stage:
    return with_defaults(Stage(name="any", learners={role: 1.0}, objective=()), config)


def zero_of(stage: Stage, config: RunConfig, *, ranks: int = 2, device: str = "cpu") -> int:
    return learner_ds(stage, config, ranks=ranks, device=device)["zero_optimization"]["stage"]


@pytest.mark.parametrize(
    ("role", "learns"),
    [("student", (9, 1)), ("large", (9, 1)), ("small", (7, 3))],
)
def test_a_teacher_that_learns_does_as_its_own_finetune_says(role, learns):
    stage = stage_of(role, two_teachers())

    assert (stage.train.max_steps, zero_of(stage, two_teachers())) == learns
    assert stage.train.learning_rate == 0.5


BF16 = {"bf16": True}


@pytest.mark.parametrize("role", ["student", "small"])
@pytest.mark.parametrize(
    ("ranks", "device", "changes", "zero"),
    [
        (1, "cpu", {}, 0),
        (2, "cpu", {}, 2),
        (1, "cpu", BF16, 0),
        (1, "cpu", {**BF16, "gradient_accumulation_steps": 2}, 2),
        (1, "cpu", {**BF16, "tokens_per_rank": 64}, 2),
        (1, "cuda", BF16, 2),
        (1, "cuda", {"bf16": False}, 0),
    ],
)
def test_one_rank_shards_nothing_unless_asked_or_to_add_16_bits(role, ranks, device, changes, zero):
    """In 16 bits ZeRO 2 adds up gradients in fp32, and ZeRO 0 does not. Views keep it too."""
    config = two_teachers()
    teacher = PooledTeacher(name="small", model="s", finetune=FinetuneOverrides(max_steps=7))
    student, train = StudentConfig(model="student"), replace(config.train, **changes)
    config = replace(config, teachers=(teacher,), student=student, train=train)

    assert zero_of(stage_of(role, config), config, ranks=ranks, device=device) == zero
    if changes == BF16:
        stage = Stage(name="any", objective=(), views={"half": View((1,), (1,))})
        assert zero_of(with_defaults(stage, config), config, ranks=ranks, device=device) == 2


def test_labels_are_weighed_in_every_training_that_learns_them_unless_a_term_says_otherwise():
    config = replace(two_teachers(), train=TrainConfig(class_weights="balanced"))
    hard = HardCrossEntropy(loss="hard_cross_entropy")
    chosen = replace(hard, class_weights={"a": 1.0})
    soft = SoftTargetKl(loss="soft_target_kl")

    for role in ("student", "small"):
        stage = Stage(name="x", learners={role: 1.0}, objective=(hard, soft))
        weighed, other = with_defaults(stage, config).objective
        assert (weighed.class_weights, other) == ("balanced", soft)
    kept = with_defaults(Stage(name="x", objective=(chosen,)), config).objective
    assert kept == (chosen,)


@pytest.mark.parametrize(
    ("keys", "on_cpu", "on_gpu"),
    [
        ({}, "fp32", "bf16"),
        ({"bf16": True}, "bf16", "bf16"),
        ({"bf16": False}, "fp32", "fp32"),
        ({"fp16": True}, "fp16", "fp16"),
    ],
)
def test_a_gpu_trains_and_scores_in_bf16_unless_the_config_says_otherwise(keys, on_cpu, on_gpu):
    train = TrainConfig(**keys)

    assert (training_dtype(train, "cpu"), training_dtype(train, "cuda")) == (on_cpu, on_gpu)
    assert (scoring_dtype(train, "cpu"), scoring_dtype(train, "cuda")) == ("fp32", on_gpu)


@pytest.mark.parametrize(
    ("dtype", "stored", "on_cpu", "on_gpu"),
    [
        (None, torch.float32, "fp32", "bf16"),
        (None, None, "fp32", "bf16"),
        (None, torch.float16, "fp32", "fp16"),
        ("fp32", torch.bfloat16, "fp32", "fp32"),
        ("bf16", torch.float32, "bf16", "bf16"),
    ],
)
def test_a_teacher_runs_in_16_bits_on_a_gpu_unless_the_config_says_otherwise(
    dtype, stored, on_cpu, on_gpu
):
    spec = TeacherConfig(model="x", dtype=dtype)

    assert frozen_dtype(spec, stored, "cpu") == on_cpu
    assert frozen_dtype(spec, stored, "cuda") == on_gpu


def test_a_gpu_without_bf16_stays_at_fp32_by_default(monkeypatch):
    monkeypatch.setattr(precision.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision.torch.cuda, "is_bf16_supported", lambda **_: False)

    assert training_dtype(TrainConfig(), "cuda") == "fp32"
    assert frozen_dtype(TeacherConfig(model="x"), torch.float32, "cuda") == "fp32"


def test_the_log_says_what_a_gpu_chooses(run_file, caplog):
    caplog.set_level(logging.INFO, logger="megakd")
    config = load_config(run_file)

    say_precision(config, "cpu")
    assert not caplog.messages
    say_precision(config, "cuda")

    assert caplog.messages == [
        "precision on cuda: training in bf16 (train.bf16, train.fp16), teacher in 16 bits as "
        "stored, or bf16 (teacher.dtype)",
        "off until a GPU has run them: fused layers (train.fused_layers: on), clipping without the "
        "host (student.deepspeed: megakd.clip_on_device: true)",
    ]
    caplog.clear()
    settings = ["train.fused_layers=off", "student.deepspeed=zero3"]
    say_precision(load_config(run_file, settings), "cuda")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("trained", "scored"), [("zero0", "0"), ("zero2", "0"), ("zero3", "3")])
def test_a_student_is_scored_sharded_only_if_it_was_trained_so(trained, scored):
    assert scoring_preset(trained) == f"teacher_zero{scored}"
