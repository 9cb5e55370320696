"""Clocks of steps that several ranks take together: CPU time of the threads, and wall-clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist

from lib.tables import Spread


class Clocks(NamedTuple):
    """Seconds of one step."""

    cpu: float
    wall: float


def timed(action: Callable[[], object]) -> Clocks:
    """Return the clocks of one action, which all ranks begin together."""
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return Clocks(time.process_time() - cpu, time.perf_counter() - wall)


def over_ranks(by_rank: Sequence[Sequence[Sequence[Sequence[float]]]]) -> list[list[Clocks]]:
    """Return the pairs of all ranks: CPU time together, wall-clock of the slowest."""
    return [
        [
            Clocks(sum(cpu for cpu, _ in side), max(wall for _, wall in side))
            for side in zip(*same, strict=True)
        ]
        for same in zip(*by_rank, strict=True)
    ]


def line(spread: Spread) -> str:
    low, high = spread.quartiles
    return f"{spread.median:.4f} (quartiles {low:.4f} to {high:.4f}, 95 % {spread.between()})"
