"""Steps that are taken by turns, and their clocks: CPU time of all threads, and wall-clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from lib.tables import Spread

T = TypeVar("T")


class Clocks(NamedTuple):
    """Seconds of one step."""

    cpu: float
    wall: float


def timed(action: Callable[[], object]) -> Clocks:
    """Return the clocks of one action, which all ranks begin together."""
    if dist.is_initialized():
        dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return Clocks(time.process_time() - cpu, time.perf_counter() - wall)


def by_turns(
    sides: Sequence[Callable[[int], T]], rounds: int, *, warm_up: int = 0
) -> list[list[T]]:
    """Return the results of all sides in every round; the next round begins with another side.

    Sides are called with the number of the round. Rounds of the warm-up come first, and are left
    out.
    """
    results = []
    for number in range(warm_up + rounds):
        places = [(number + place) % len(sides) for place in range(len(sides))]
        by_place = {place: sides[place](number) for place in places}
        results.append([by_place[place] for place in range(len(sides))])
    return results[warm_up:]


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
