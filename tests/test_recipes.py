"""What a stage inherits from the run's sections."""

from __future__ import annotations

import pytest

from megakd.config import FinetuneOverrides, TrainConfig
from megakd.recipes import inherit


def test_finetune_takes_the_keys_of_train_that_it_does_not_set():
    train = TrainConfig(per_device_train_batch_size=3, learning_rate=1.0, bf16=True, max_steps=9)

    found = inherit(train, FinetuneOverrides(learning_rate=2.0, bf16=False, deepspeed="zero3"))

    expected = {"per_device_train_batch_size": 3, "learning_rate": 2.0, "bf16": False}
    assert {key: getattr(found, key) for key in expected} == expected
    assert found.max_steps == 9


@pytest.mark.parametrize(
    ("train", "overrides", "decides"),
    [
        ({"max_steps": 9}, {"num_train_epochs": 2.0}, (None, 2.0)),
        ({"num_train_epochs": 5.0}, {"max_steps": 7}, (7, 5.0)),  # max_steps wins in a section
        ({"max_steps": 9}, {"max_steps": 7}, (7, 3.0)),
        ({"max_steps": 9}, {"max_steps": 7, "num_train_epochs": 2.0}, (7, 2.0)),
    ],
    ids=["epochs there", "steps there", "steps in both", "both there"],
)
def test_max_steps_and_num_train_epochs_displace_each_other(train, overrides, decides):
    found = inherit(TrainConfig(**train), FinetuneOverrides(**overrides))

    assert (found.max_steps, found.num_train_epochs) == decides


@pytest.mark.parametrize(
    ("overrides", "decides"),
    [
        ({"warmup_ratio": 0.1}, (0, 0.1)),
        ({"warmup_steps": 3}, (3, 0.5)),
        ({}, (9, 0.5)),
    ],
    ids=["ratio there", "steps there", "neither"],
)
def test_a_warm_up_of_its_own_displaces_that_of_train(overrides, decides):
    train = TrainConfig(warmup_steps=9, warmup_ratio=0.5)

    found = inherit(train, FinetuneOverrides(**overrides))

    assert (found.warmup_steps, found.warmup_ratio) == decides
