"""Rows packed by a token budget give the losses and gradients of padded rows."""

from __future__ import annotations

import pytest
import torch
from equal_runs import INNER, LANGUAGE, STEPS, assert_same, config_tree, plain_run, write
from equal_runs import write_folder as write_models

BUDGET = 40
RAGGED_STEPS = 4
"""41 rows in steps of 12: the last step has 5 rows, fewer than the micro-batches need."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("packed"))


def both(workers, path, ranks, *overrides):
    """The same steps with padded rows and with packed rows."""
    rows = ["train.per_device_train_batch_size=3"]
    rows += [f"train.gradient_accumulation_steps={4 // ranks}", *overrides]
    packed = [*rows, f"train.tokens_per_rank={BUDGET}"]
    return tuple(
        workers(ranks).run("packed_cases.train", path, given, RAGGED_STEPS)[0]
        for given in (rows, packed)
    )


def assert_equal(packed, padded):
    for ours, theirs in zip(packed["losses"], padded["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=3e-6, abs=1e-6)
    for ours, theirs in zip(packed["gradients"], padded["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            error = (gradient - theirs[name]).abs().max().item()
            assert error <= 2e-6 * max(1.0, theirs[name].abs().max().item()), (name, error)
    for name, weight in packed["final"].items():
        torch.testing.assert_close(weight, padded["final"][name], rtol=0, atol=5e-6)


# (ranks, student's ZeRO stage, teacher's, gradient checkpointing, terms)
CASES = [
    (ranks, student, teacher, student > 1, LANGUAGE)
    for ranks in (1, 2)
    for student in range(4)
    for teacher in (0, 3)
]
CASES += [(1, 2, 3, True, INNER), (2, 0, 3, False, INNER), (2, 3, 0, False, INNER)]


@pytest.mark.parametrize(
    ("ranks", "student_zero", "teacher_zero", "checkpointing", "terms"),
    CASES,
)
def test_packed_rows_give_the_losses_and_gradients_of_padded_rows(
    workers, folder, tmp_path, ranks, student_zero, teacher_zero, checkpointing, terms
):
    tree = config_tree(
        folder, "llama-tied", terms, student_zero=student_zero, teacher_zero=teacher_zero
    )
    tree["train"]["gradient_checkpointing"] = checkpointing
    path = write(tree, tmp_path / "config.yaml")

    padded, packed = both(workers, path, ranks)

    assert_equal(packed, padded)


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_text_distils_as_in_one_plain_process(workers, folder, tmp_path, ranks):
    tree = config_tree(folder, "llama-untied", LANGUAGE, student_zero=2, teacher_zero=3)
    tree["train"] |= {
        "per_device_train_batch_size": 12 // ranks,
        "gradient_accumulation_steps": 1,
        "tokens_per_rank": BUDGET,
    }
    path = write(tree, tmp_path / "config.yaml")

    found = workers(ranks).run("train", path, [], STEPS)[0]

    assert_same(found, plain_run(path, LANGUAGE, found["initial"]))


@pytest.mark.parametrize("student_zero", [2, 3])
def test_offloaded_layer_inputs_give_the_same_gradients(workers, folder, tmp_path, student_zero):
    tree = config_tree(folder, "llama-tied", LANGUAGE, student_zero=student_zero, teacher_zero=3)
    tree["train"] |= {
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "tokens_per_rank": BUDGET,
        "gradient_checkpointing": True,
    }
    path = write(tree, tmp_path / "config.yaml")

    kept = workers(2).run("packed_cases.train", path, [], 2)[0]
    settings = ["train.activation_offload=true"]
    moved = workers(2).run("packed_cases.train_offloaded", path, settings, 2)[0]

    assert moved["moved"] > 0
    assert_equal(moved, kept)
