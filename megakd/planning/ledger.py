"""Peaks of the memory in use, found from what a rank holds at one time after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, get_args

from megakd.planning.moments import NOTHING, Amount

Part = Literal[
    "weights",
    "gradients",
    "optimizer",
    "averages",
    "activations",
    "gather",
    "workspace",
    "elastic",
]
PARTS: tuple[Part, ...] = get_args(Part)
Place = Literal["device", "host"]
_LIFETIMES = {
    "weights": "models",
    "optimizer": "models",
    "averages": "models",
    "gather": "module",
}
HOLES = {"step": 0.4, "module": 0.1}
"""Extra share of the heap by the lifetime of its blocks, for holes that no later block fills.

Fitted to the runs of `benchmarks/plan.py`.
"""


class Share(NamedTuple):
    """A kind of memory: the role that owns it, its part, and its place."""

    role: str
    part: Part
    place: Place = "device"


Holding: TypeAlias = Mapping[Share, Amount]
"""Memory in use at one time."""


def together(*holdings: Holding) -> dict[Share, Amount]:
    """Return the sum of several holdings."""
    found: dict[Share, Amount] = {}
    for holding in holdings:
        for share, amount in holding.items():
            found[share] = found.get(share, NOTHING).plus(amount)
    return found


@dataclass(frozen=True)
class Peak:
    """The highest memory in use: bytes, time, and shares."""

    total: int = 0
    when: str = ""
    shares: dict[Share, int] = field(default_factory=dict)


class Ledger:
    """The peaks of a rank.

    peaks: by place. most: peak bytes by kind.

    On a CPU rank both places are the same, and the process keeps the memory of freed small
    blocks: the C library reuses it in the next step (see `engine.memory`). Freed memory serves
    only blocks with the same lifetime: blocks of the models, of a step, or gathered for a module.
    """

    def __init__(self, device: str) -> None:
        self.peaks: dict[Place, Peak] = {"device": Peak(), "host": Peak()}
        self.most: Counter[Share] = Counter()
        self._is_cpu = device == "cpu"
        self._kept: Counter[str] = Counter()

    def look(self, when: str, *holdings: Holding) -> None:
        """Record what a rank holds at one time, during the activity `when`."""
        held = together(*holdings)
        shares = {share: amount.total for share, amount in held.items() if amount.total}
        self.most |= Counter(shares)  # the maximum of each
        if self._is_cpu:
            total = self._with_heap(held)
            totals: dict[Place, int] = {"device": total, "host": total}
        else:
            totals = {"device": 0, "host": 0}
            for share, total in shares.items():
                totals[share.place] += total
        for place, total in totals.items():
            if total > self.peaks[place].total:
                here = {s: size for s, size in shares.items() if self._is_cpu or s.place == place}
                self.peaks[place] = Peak(total, when, here)

    def _with_heap(self, held: Holding) -> int:
        """Return the bytes in use on a CPU, with the small blocks that the heap keeps."""
        small: Counter[str] = Counter()
        for share, amount in held.items():
            small[_LIFETIMES.get(share.part, "step")] += amount.small
        self._kept |= small
        kept = sum(size * (1 + HOLES.get(lived, 0.0)) for lived, size in self._kept.items())
        return sum(amount.large for amount in held.values()) + round(kept)
