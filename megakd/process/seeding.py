"""Random weights that are equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cpu_seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator in the body, and restore its state afterwards.

    `torch.manual_seed` would also seed the generators of all GPUs, whose states are not restored:
    all ranks would then draw the same dropout masks.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
