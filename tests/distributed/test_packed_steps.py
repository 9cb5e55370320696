"""Rows packed by a token budget give the losses, gradients and final weights of padded rows."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from equal_runs import INNER, LANGUAGE, ROWS, assert_same, plain_run

BUDGET = 40
RAGGED_STEPS = 4
"""41 rows in steps of 12: the last step has 5 rows, fewer than the micro-batches need."""
MICRO_BATCHES = {1: 4, 2: 2, 3: 2}
"""Micro-batches of padded rows on each rank, by the number of ranks."""
MIXES = {"on-policy": {"rollout": 1.0}, "mixed": {"rollout": 0.5, "data": 0.5}}
MOST_NEW_TOKENS = 8


def both(workers, path, ranks):
    """Run the steps with padded rows and with packed rows, in two folders."""
    cuts = MICRO_BATCHES[ranks]
    rows = [f"train.per_device_train_batch_size={ROWS // ranks // cuts}"]
    rows += [f"train.gradient_accumulation_steps={cuts}"]
    packed = [*rows, f"train.tokens_per_rank={BUDGET}"]
    return tuple(
        workers(ranks).run(
            "packed_cases.train", path, [f"output_dir={path}-{name}", *keys], RAGGED_STEPS
        )[0]
        for name, keys in (("padded", rows), ("packed", packed))
    )


def texts_of(path, name):
    """The generated texts of a run by the name of their file."""
    folder = Path(f"{path}-{name}") / "rollouts" / "student"
    return {file.name: file.read_text() for file in folder.glob("*.jsonl")}


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
    for ranks in MICRO_BATCHES
    for student in range(4)
    for teacher in (0, 3)
]
CASES += [(1, 2, 3, True, INNER), (2, 0, 3, False, INNER), (2, 3, 0, False, INNER)]
CASES += [(3, 3, 3, True, INNER)]


@pytest.mark.parametrize(("ranks", "student", "teacher", "recomputes", "terms"), CASES)
def test_packed_rows_give_the_losses_and_gradients_of_padded_rows(
    workers, write_run, ranks, student, teacher, recomputes, terms
):
    train = {"gradient_checkpointing": recomputes}
    path = write_run("llama-tied", terms, (student, teacher), train=train)

    padded, packed = both(workers, path, ranks)

    assert_equal(packed, padded)


QUICK = {("on-policy", 1, 0, 0), ("mixed", 2, 3, 3), ("mixed", 3, 2, 0), ("on-policy", 3, 3, 3)}
"""(source, ranks, student's ZeRO stage, teacher's) of the cases that every test run includes."""
GENERATED = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(MIXES, MICRO_BATCHES, range(4), (0, 3))
]


@pytest.mark.parametrize(("source", "ranks", "student", "teacher"), GENERATED)
def test_packed_texts_of_the_student_give_the_losses_and_gradients_of_padded_texts(
    workers, write_run, source, ranks, student, teacher
):
    mix = {"mix": MIXES[source], "mix_per": "row"}
    sections = {
        "rollout": {"max_new_tokens": MOST_NEW_TOKENS, **mix},
        "task": {"max_length": 16 + MOST_NEW_TOKENS},
    }
    path = write_run("llama-tied", LANGUAGE, (student, teacher), **sections)

    padded, packed = both(workers, path, ranks)

    assert len(texts_of(path, "padded")) == RAGGED_STEPS
    assert texts_of(path, "packed") == texts_of(path, "padded")
    assert_equal(packed, padded)


def packed_by(ranks):
    return {
        "per_device_train_batch_size": ROWS // ranks,
        "gradient_accumulation_steps": 1,
        "tokens_per_rank": BUDGET,
    }


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_packed_text_distils_as_in_one_plain_process(distil, ranks):
    path, found = distil("llama-untied", LANGUAGE, (2, 3), ranks=ranks, train=packed_by(ranks))

    assert_same(found[0], plain_run(path, LANGUAGE, found[0]["initial"]))


@pytest.mark.parametrize("student", [2, 3])
def test_offloaded_layer_inputs_give_the_same_gradients(workers, write_run, student):
    train = {**packed_by(2), "gradient_checkpointing": True}
    path = write_run("llama-tied", LANGUAGE, (student, 3), train=train)

    kept = workers(2).run("packed_cases.train", path, [], 2)[0]
    settings = ["train.activation_offload=true"]
    moved = workers(2).run("packed_cases.train_offloaded", path, settings, 2)[0]

    assert moved["moved"] > 0
    assert_equal(moved, kept)
