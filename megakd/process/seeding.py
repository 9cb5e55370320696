"""Random generators of a rank: seeded at the start of a stage, stored in checkpoints."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of all random generators of this rank, as plain values."""
    # Third-party data collators draw from NumPy's old global generator.
    numpy = dict(np.random.get_state(legacy=False))  # noqa: NPY002
    numpy["state"] = {**numpy["state"], "key": numpy["state"]["key"].tolist()}
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the state that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int, rank: int, first_step: int = 0) -> None:
    """Seed a stage's random generators; only torch's, which dropout uses, differs between ranks.

    `first_step` of a window, so that it does not repeat the random numbers of the one before.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed * 10007 + rank + 1_000_003 * first_step)


@contextmanager
def cpu_seeded(seed: int) -> Iterator[None]:
    """Seed the CPU alone in the body, and restore its state; all ranks may use the same seed.

    `torch.manual_seed` would give the GPUs of all ranks the same dropout masks from now on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
