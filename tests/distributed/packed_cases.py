"""Training on rows of many lengths, such as conversations, in place of packed text."""

from __future__ import annotations

from unittest.mock import patch

import cases
import numpy as np
from datasets import Dataset
from torch.autograd.graph import save_on_cpu

from megakd.contract.batch import IGNORE
from megakd.inputs.inputs import encoded_rows
from megakd.losses.bundle import build_bundle

ROWS, LONGEST, VOCABULARY = 41, 16, 300


def conversations() -> Dataset:
    """Rows of 2 to 16 tokens without positions; only the answers are predicted."""
    rng = np.random.default_rng(7)
    rows = []
    for _ in range(ROWS):
        ids = rng.integers(5, VOCABULARY, size=rng.integers(2, LONGEST + 1)).tolist()
        prompt = int(rng.integers(1, len(ids)))
        labels = [*([IGNORE] * (prompt - 1)), *ids[prompt:], IGNORE]
        rows.append({"input_ids": ids, "labels": labels, "prompt_length": prompt})
    return Dataset.from_list(rows)


def train(config_path: str, overrides: list[str], steps: int) -> dict:
    """Return what `cases.train` returns, after training on conversations."""

    def encoded(*arguments, **keys):
        return encoded_rows(*arguments, **keys)._replace(train=conversations())

    with patch("megakd.inputs.inputs.encoded_rows", encoded):
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

    building = patch("megakd.training.assembly.build_bundle", build)
    with building, patch("transformers.modeling_utils.save_on_cpu", moving):
        return {**train(config_path, overrides, steps), "moved": len(moved)}
