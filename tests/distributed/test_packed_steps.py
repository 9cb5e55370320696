"""Rows packed by a token budget give the losses, gradients and final weights of padded rows."""

from __future__ import annotations

from unittest.mock import patch

import cases
import numpy as np
import pytest
from datasets import Dataset
from equal_runs import INNER, LANGUAGE, PACKED, ROWS, assert_equal, cut_of
from slow_cases import slow
from torch.autograd.graph import save_on_cpu

from megakd.data.batch import IGNORE
from megakd.losses.bundle import build_bundle
from megakd.training.inputs import encoded_rows

CONVERSATIONS, LONGEST, VOCABULARY = 41, 16, 300


def conversations() -> Dataset:
    """Rows of 2 to 16 tokens without positions; only the answers are predicted."""
    rng = np.random.default_rng(7)
    rows = []
    for _ in range(CONVERSATIONS):
        ids = rng.integers(5, VOCABULARY, size=rng.integers(2, LONGEST + 1)).tolist()
        prompt = int(rng.integers(1, len(ids)))
        labels = [*([IGNORE] * (prompt - 1)), *ids[prompt:], IGNORE]
        rows.append({"input_ids": ids, "labels": labels, "prompt_length": prompt})
    return Dataset.from_list(rows)


def train(config_path: str, overrides: list[str], steps: int) -> dict:
    """Return what `cases.train` returns, after training on conversations."""

    def encoded(*arguments, **keys):
        return encoded_rows(*arguments, **keys)._replace(train=conversations())

    with patch("megakd.training.inputs.encoded_rows", encoded):
        return cases.train(config_path, overrides, steps)


def train_offloaded(config_path: str, overrides: list[str], steps: int) -> dict:
    """Return what `train` returns, and how many layers have moved their inputs.

    The inputs move as on a GPU, but to memory that is not pinned, which a CPU does not have.
    """
    moved = []

    def moving(**_):
        moved.append(1)
        return save_on_cpu(pin_memory=False)

    def build(*arguments, **keys):
        with patch("torch.cuda.is_available", return_value=True):
            return build_bundle(*arguments, **keys)

    building = patch("megakd.training.learners.build_bundle", build)
    with building, patch("transformers.modeling_utils.save_on_cpu", moving):
        return {**train(config_path, overrides, steps), "moved": len(moved)}


RAGGED_STEPS = 4
"""41 rows in steps of 12: the last step has 5 rows, fewer than the micro-batches need."""
MICRO_BATCHES = {1: 4, 2: 2, 3: 2}
"""Micro-batches of padded rows on each rank, by the number of ranks."""


# (ranks, student's ZeRO stage, teacher's, gradient checkpointing, terms)
CASES = [(2, 3, 3, True, LANGUAGE), (1, 2, 3, True, INNER)]
SLOW = [(1, 0, 0, False, LANGUAGE), (2, 1, 3, False, LANGUAGE), (3, 2, 0, True, LANGUAGE)]
SLOW += [(2, 3, 0, False, INNER)]


@pytest.mark.parametrize(
    ("ranks", "student", "teacher", "recomputes", "terms"), [*CASES, *slow(*SLOW)]
)
def test_packed_rows_give_the_losses_and_gradients_of_padded_rows(
    workers, write_run, ranks, student, teacher, recomputes, terms
):
    cuts = MICRO_BATCHES[ranks]
    train = cut_of((ranks, ROWS // ranks // cuts, cuts)) | {"gradient_checkpointing": recomputes}
    path = write_run("llama-tied", terms, (student, teacher), train=train)
    budget = [f"train.tokens_per_rank={PACKED['tokens_per_rank']}"]

    padded, packed = (
        workers(ranks).run("test_packed_steps.train", path, words, RAGGED_STEPS)[0]
        for words in ([], budget)
    )

    assert_equal(packed, padded)


@pytest.mark.slow
def test_packed_texts_of_a_teacher_give_the_losses_and_gradients_of_padded_texts(
    workers, write_run
):
    mix = {"max_new_tokens": 8, "mix": 0.5}
    sections = {
        "rollout": {**mix, "by": "teacher"},
        "task": {"max_length": 24},
        "train": cut_of((2, ROWS // 4, 2)),
    }
    path = write_run("llama-tied", LANGUAGE, (3, 3), **sections)
    budget = f"train.tokens_per_rank={PACKED['tokens_per_rank']}"

    padded, packed = (
        workers(2).run("test_packed_steps.train", path, [f"output_dir={path}-{n}", *words], 4)[0]
        for n, words in enumerate(([], [budget]))
    )

    assert_equal(packed, padded)


@pytest.mark.slow
def test_offloaded_layer_inputs_give_the_same_gradients(workers, write_run):
    train = {**PACKED, "gradient_checkpointing": True}
    path = write_run("llama-tied", LANGUAGE, (3, 3), train=train)

    kept = workers(2).run("test_packed_steps.train", path, [], 2)[0]
    settings = ["train.activation_offload=true"]
    moved = workers(2).run("test_packed_steps.train_offloaded", path, settings, 2)[0]

    assert moved["moved"] > 0
    assert_equal(moved, kept)
