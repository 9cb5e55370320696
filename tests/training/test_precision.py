"""The dtypes of training, teachers and scoring: what the config sets, and what a GPU chooses."""

import logging

import pytest
import torch

from megakd.config.file import load_config
from megakd.config.models import TeacherConfig
from megakd.config.train import TrainConfig
from megakd.inputs import precision
from megakd.inputs.precision import frozen_dtype, say_precision, scoring_dtype, training_dtype


@pytest.mark.parametrize(
    ("keys", "on_cpu", "on_gpu", "scored_on_gpu"),
    [
        ({}, "fp32", "bf16", "bf16"),
        ({"bf16": True}, "bf16", "bf16", "bf16"),
        ({"bf16": False}, "fp32", "fp32", "fp32"),
        ({"fp16": True}, "fp16", "fp16", "fp16"),
    ],
    ids=["default", "bf16", "not bf16", "fp16"],
)
def test_a_gpu_trains_in_bf16_unless_the_config_says_otherwise(keys, on_cpu, on_gpu, scored_on_gpu):
    train = TrainConfig(**keys)

    assert (training_dtype(train, "cpu"), training_dtype(train, "cuda")) == (on_cpu, on_gpu)
    assert (scoring_dtype(train, "cpu"), scoring_dtype(train, "cuda")) == ("fp32", scored_on_gpu)


@pytest.mark.parametrize(
    ("dtype", "stored", "on_cpu", "on_gpu"),
    [
        (None, torch.float32, "fp32", "bf16"),
        (None, None, "fp32", "bf16"),
        (None, torch.bfloat16, "fp32", "bf16"),
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
        "stored, or bf16 (teacher.dtype)"
    ]
