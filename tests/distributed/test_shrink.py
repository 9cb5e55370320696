"""Shrink and kept layers on two ranks: the same choice and the same student as on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from equal_runs import ZERO3
from tiny_runs import (
    NO_DROPOUT,
    bert,
    config_tree,
    llama,
    save_tokenizer,
    write_config,
    write_reviews,
    write_text,
)
from transformers import AutoConfig, AutoModelForCausalLM
from whole_run import finish

STAGES = {2: ("zero2", "teacher_zero0"), 3: (ZERO3, "teacher_zero3")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text, and a Llama with random weights."""
    folder = tmp_path_factory.mktemp("shrink")
    text = write_text(folder / "text.txt", documents=120)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "tie_word_embeddings": False}
    keys = llama(4, **sizes, num_attention_heads=4, num_key_value_heads=2)["config"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=320, **keys))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "llama")
    save_tokenizer(folder / "llama", text.read_text().split("\n\n"), kind="bpe")
    return folder


def config_of(folder: Path, out: Path, *, rows: int, zero: int) -> Path:
    student, teacher = STAGES[zero]
    tree = config_tree(
        out / "out",
        {"type": "causal_lm", "dataset": str(folder / "text.txt")},
        teacher={"model": str(folder / "llama"), "deepspeed": teacher},
        method={
            "name": "shrink",
            "target_sparsity": 0.4,
            "round_to": 4,
            "trial_steps": 3,
            "repair_steps": 3,
        },
        train={
            "per_device_train_batch_size": rows,
            "learning_rate": 0.01,
            "adam_epsilon": 0.01,
        },
    )
    tree["student"] = {"model": "from_teacher", "deepspeed": student}
    return write_config(out / "run.yaml", tree)


@pytest.fixture(scope="module")
def alone(workers, folder, tmp_path_factory) -> dict:
    """One rank with the rows of both."""
    config = config_of(folder, tmp_path_factory.mktemp("alone"), rows=6, zero=2)
    return workers(1).run("shrink_cases.shrink", str(config), [])[0]


def assert_same(rank: dict, alone: dict) -> None:
    assert rank["layers"] == pytest.approx(alone["layers"], abs=1e-5)
    assert rank["state"].keys() == alone["state"].keys()
    for name, weight in alone["state"].items():
        torch.testing.assert_close(rank["state"][name], weight, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_choose_and_train_what_one_rank_does(workers, folder, alone, tmp_path, zero):
    config = config_of(folder, tmp_path, rows=3, zero=zero)

    first, second = workers(2).run("shrink_cases.shrink", str(config), [])

    for key in ("candidates", "layers"):
        assert first[key] == second[key]
    for ours, theirs in zip(first["candidates"], alone["candidates"], strict=True):
        assert ours["chosen"] == theirs["chosen"]
        assert ours["metric"] == pytest.approx(theirs["metric"], rel=1e-3)
    for rank in (first, second):
        assert_same(rank, alone)


@pytest.fixture(scope="module")
def encoder(one_rank, tmp_path_factory) -> Path:
    """Reviews, and a BERT of three layers that has learned to classify them."""
    folder = tmp_path_factory.mktemp("encoder")
    task = {"type": "classification", "dataset": str(write_reviews(folder / "reviews"))}
    tree = config_tree(folder / "teacher", task, student={"model": bert(3, **NO_DROPOUT)})
    finish(one_rank, write_config(folder / "teacher.yaml", tree), "train.max_steps=30")
    return folder


def keeping_two(encoder: Path, out: Path, *, rows: int, student: Any, teacher: str) -> Path:
    tree = config_tree(
        out / "out",
        {"type": "classification", "dataset": str(encoder / "reviews")},
        teacher={"model": str(encoder / "teacher" / "final"), "deepspeed": teacher},
        method={"name": "single"},
        train={"per_device_train_batch_size": rows, "adam_epsilon": 0.01},
    )
    tree["student"] = {"model": "from_teacher", "layers": 2, "deepspeed": student}
    return write_config(out / "run.yaml", tree)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("zero0", "teacher_zero0"),
        ("zero1", "teacher_zero3"),
        ("zero2", "teacher_zero0"),
        (ZERO3, "teacher_zero3"),
    ],
    ids=["0", "1", "2", "3"],
)
def test_two_ranks_keep_the_layers_of_an_encoder_that_one_rank_keeps(
    workers, encoder, tmp_path, student, teacher
):
    one = keeping_two(encoder, tmp_path / "one", rows=6, student="zero0", teacher="teacher_zero0")
    two = keeping_two(encoder, tmp_path / "two", rows=3, student=student, teacher=teacher)

    (alone,) = workers(1).run("shrink_cases.shrink", str(one), [])

    for rank in workers(2).run("shrink_cases.shrink", str(two), []):
        assert_same(rank, alone)


def test_the_score_of_a_layer_is_the_rise_of_the_loss_without_the_layer(workers, folder, tmp_path):
    config = config_of(folder, tmp_path, rows=6, zero=3)

    for scores, rises in workers(2).run("shrink_cases.layer_losses", str(config), []):
        assert scores == pytest.approx(rises, abs=1e-5)
        assert max(map(abs, rises)) > 1e-3
