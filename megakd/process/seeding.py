"""Random weights that are equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cpu_seeded(seed: int) -> Iterator[None]:
    """Seed the CPU alone in the body, and restore its state; all ranks may use the same seed.

    `torch.manual_seed` would give the GPUs of all ranks the same dropout masks from now on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
