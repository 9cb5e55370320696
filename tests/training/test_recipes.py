"""Settings that a stage inherits from the run's sections."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megakd.config.models import PooledTeacher, StudentConfig
from megakd.config.run import RunConfig
from megakd.config.task import TaskConfig
from megakd.config.train import FinetuneOverrides, TrainConfig, inherit
from megakd.contract.stage import Stage
from megakd.contract.terms import HardCrossEntropy, SoftTargetKl
from megakd.contract.views import View
from megakd.methods.skdbert import SkdbertConfig
from megakd.training.recipes import completed


def test_finetune_takes_the_keys_of_train_that_it_does_not_set():
    train = TrainConfig(per_device_train_batch_size=3, learning_rate=1.0, bf16=True, max_steps=9)

    result = inherit(train, FinetuneOverrides(learning_rate=2.0, bf16=False, deepspeed="zero3"))

    assert (result.per_device_train_batch_size, result.max_steps) == (3, 9)
    assert (result.learning_rate, result.bf16) == (2.0, False)


LENGTH, WARM_UP = ("max_steps", "num_train_epochs"), ("warmup_steps", "warmup_ratio")


@pytest.mark.parametrize(
    ("keys", "train", "overrides", "decides"),
    [
        (LENGTH, {"max_steps": 9}, {"num_train_epochs": 2.0}, (None, 2.0)),
        # max_steps wins in a section
        (LENGTH, {"num_train_epochs": 5.0}, {"max_steps": 7}, (7, 5.0)),
        (LENGTH, {"max_steps": 9}, {"max_steps": 7}, (7, 3.0)),
        (LENGTH, {"max_steps": 9}, {"max_steps": 7, "num_train_epochs": 2.0}, (7, 2.0)),
        (WARM_UP, dict(zip(WARM_UP, (9, 0.5), strict=True)), {"warmup_ratio": 0.1}, (0, 0.1)),
        (WARM_UP, dict(zip(WARM_UP, (9, 0.5), strict=True)), {"warmup_steps": 3}, (3, 0.5)),
        (WARM_UP, dict(zip(WARM_UP, (9, 0.5), strict=True)), {}, (9, 0.5)),
    ],
)
def test_steps_and_shares_of_a_run_displace_each_other(keys, train, overrides, decides):
    result = inherit(TrainConfig(**train), FinetuneOverrides(**overrides))

    assert tuple(getattr(result, key) for key in keys) == decides


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


def stage_of(role: str, config: RunConfig, *, ranks: int = 1, device: str = "cpu") -> Stage:
    stage = Stage(name="any", learners={role: 1.0}, objective=())
    return completed(stage, config, ranks=ranks, device=device)


@pytest.mark.parametrize(
    ("role", "learns"),
    [("student", (9, "zero1")), ("large", (9, "zero1")), ("small", (7, "zero3"))],
)
def test_a_teacher_that_learns_does_as_its_own_finetune_says(role, learns):
    stage = stage_of(role, two_teachers())

    assert (stage.train.max_steps, stage.deepspeed) == learns
    assert stage.train.learning_rate == 0.5


@pytest.mark.parametrize("role", ["student", "small"])
@pytest.mark.parametrize(
    ("ranks", "device", "changes", "preset"),
    [
        (1, "cpu", {}, "zero0"),
        (2, "cpu", {}, "auto"),
        (1, "cpu", {"bf16": True}, "zero0"),
        (1, "cpu", {"bf16": True, "gradient_accumulation_steps": 2}, "auto"),
        (1, "cpu", {"bf16": True, "tokens_per_rank": 64}, "auto"),
        (1, "cuda", {"bf16": True}, "auto"),
        (1, "cuda", {"bf16": False}, "zero0"),
    ],
)
def test_one_rank_shards_nothing_unless_asked_or_to_add_16_bits(
    role, ranks, device, changes, preset
):
    """In 16 bits ZeRO 2 adds up gradients in fp32, and ZeRO 0 does not."""
    config = two_teachers()
    teacher = PooledTeacher(name="small", model="s", finetune=FinetuneOverrides(max_steps=7))
    student, train = StudentConfig(model="student"), replace(config.train, **changes)
    config = replace(config, teachers=(teacher,), student=student, train=train)

    assert stage_of(role, config, ranks=ranks, device=device).deepspeed == preset


def test_views_in_16_bits_keep_zero_2():
    train = replace(two_teachers().train, bf16=True)
    config = replace(two_teachers(), student=StudentConfig(model="student"), train=train)
    stage = Stage(name="any", objective=(), views={"half": View((1,), (1,))})

    assert completed(stage, config, ranks=1, device="cpu").deepspeed == "auto"


def test_labels_are_weighed_in_every_training_that_learns_them_unless_a_term_says_otherwise():
    config = replace(two_teachers(), train=TrainConfig(class_weights="balanced"))
    hard = HardCrossEntropy(loss="hard_cross_entropy")
    chosen = replace(hard, class_weights={"a": 1.0})
    soft = SoftTargetKl(loss="soft_target_kl")

    for role in ("student", "small"):
        stage = Stage(name="x", learners={role: 1.0}, objective=(hard, soft))
        weighed, other = completed(stage, config).objective
        assert (weighed.class_weights, other) == ("balanced", soft)
    kept = completed(Stage(name="x", objective=(chosen,)), config).objective
    assert kept == (chosen,)
