"""Shrink and kept layers on two ranks: the same choice and the same student as on one rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import lab_of
from equal_runs import ZERO3, write_llama
from slow_cases import slow
from tiny_runs import NO_DROPOUT, bert, review_task, run_in
from whole_run import weights

from megakd.config.sections import TeacherConfig
from megakd.methods import run_method
from megakd.models.fitting import ReadyTeacher
from megakd.models.layers import with_layers
from megakd.training.evaluation import few, scorer_for


def shrink(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Run the method; return the student's weights, and scores of the layers."""
    with lab_of(config_path, overrides, writes=True) as lab:
        result = run_method(lab.config.method, lab)
        layers = lab.work.layer_scores("teacher")
    return {"state": weights(result.folder), "layers": layers}


def layer_losses(config_path: str, overrides: list[str]) -> tuple[list[float], list[float]]:
    """Return the scores of the layers, and the rise of the loss of models without each layer."""
    with lab_of(config_path, overrides, writes=True) as lab:
        name, assembly = lab.teacher(), lab.work.assembly
        scores, source = lab.work.layer_scores(name), lab.model(name)
        rows = few(assembly.prepared.encoded.validation, assembly.config.task.type)

        def loss(layers: tuple[int, ...]) -> float:
            fewer = with_layers(source, layers, where="student.layers")
            spec = TeacherConfig(model="fewer", deepspeed="teacher_zero0")
            with assembly.loaded(ReadyTeacher(fewer, spec)) as model:
                return scorer_for(assembly).loss(model.predict, rows)

        numbers = range(1, len(scores) + 1)
        whole = loss(tuple(numbers))
        without = [loss(tuple(n for n in numbers if n != left_out)) for left_out in numbers]
        return list(scores), [value - whole for value in without]


STAGES = {2: ("zero2", "teacher_zero0"), 3: (ZERO3, "teacher_zero3")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "tie_word_embeddings": False}
    return write_llama(tmp_path_factory.mktemp("shrink"), 4, **sizes)


def config_of(folder: Path, out: Path, *, rows: int, zero: int) -> Path:
    student, teacher = STAGES[zero]
    return run_in(
        out,
        {"type": "causal_lm", "dataset": str(folder / "text.txt")},
        teacher={"model": str(folder / "llama"), "deepspeed": teacher},
        student={"model": "from_teacher", "deepspeed": student},
        method={"name": "shrink", "flops": "60%", "round_to": 4},
        train={"per_device_train_batch_size": rows, "adam_epsilon": 0.01, "max_steps": 4},
    )


WHOLE = ["method.flops=50%"]


@pytest.fixture(scope="module")
def alone(workers, folder, tmp_path_factory) -> Callable[..., dict]:
    """One rank with the rows of both, by the overrides of the config."""

    @functools.cache
    def run(*overrides: str) -> dict:
        config = config_of(folder, tmp_path_factory.mktemp("alone"), rows=6, zero=2)
        return workers(1).run("test_shrink.shrink", str(config), [*overrides])[0]

    return run


def assert_same(rank: dict, alone: dict) -> None:
    assert rank["layers"] == pytest.approx(alone["layers"], abs=1e-5)
    torch.testing.assert_close(rank["state"], alone["state"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("sizes", "zero"), [([], 3), *slow(([], 2), (WHOLE, 2), (WHOLE, 3))])
def test_two_ranks_choose_and_train_what_one_rank_does(
    workers, folder, alone, tmp_path, zero, sizes
):
    config = config_of(folder, tmp_path, rows=3, zero=zero)
    one = alone(*sizes)

    for rank in workers(2).run("test_shrink.shrink", str(config), sizes):
        assert_same(rank, one)


def keeping_two(folder: Path, *, rows: int, student: Any, teacher: str) -> Path:
    return run_in(
        folder,
        review_task(folder),
        teacher={"model": bert(3, initializer_range=0.5, **NO_DROPOUT), "deepspeed": teacher},
        student={"model": "from_teacher", "layers": 2, "deepspeed": student},
        method={"name": "single"},
        train={"per_device_train_batch_size": rows, "adam_epsilon": 0.01},
    )


@pytest.mark.parametrize(
    ("student", "teacher"),
    [*slow(("zero1", "teacher_zero0")), (ZERO3, "teacher_zero3")],
    ids=["1", "3"],
)
def test_two_ranks_keep_the_layers_of_an_encoder_that_one_rank_keeps(
    workers, tmp_path, student, teacher
):
    one = keeping_two(tmp_path / "one", rows=6, student="zero0", teacher="teacher_zero0")
    two = keeping_two(tmp_path / "two", rows=3, student=student, teacher=teacher)

    (alone,) = workers(1).run("test_shrink.shrink", str(one), [])

    for rank in workers(2).run("test_shrink.shrink", str(two), []):
        assert_same(rank, alone)


def test_the_score_of_a_layer_is_the_rise_of_the_loss_without_the_layer(workers, folder, tmp_path):
    config = config_of(folder, tmp_path, rows=6, zero=3)

    for scores, rises in workers(2).run("test_shrink.layer_losses", str(config), []):
        assert scores == pytest.approx(rises, abs=1e-5)
        assert max(map(abs, rises)) > 1e-3
