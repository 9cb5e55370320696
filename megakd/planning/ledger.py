"""Record of the memory in use, and of its peaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megakd.planning.moments import NOTHING, Amount

Part = Literal["weights", "gradients", "optimizer", "activations", "gather", "workspace", "elastic"]
PARTS: tuple[Part, ...] = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "gather",
    "workspace",
    "elastic",
)
Place = Literal["device", "host"]
_LIFETIMES = {"weights": "models", "optimizer": "models", "gather": "module"}
HOLES = {"step": 0.4, "module": 0.1}
"""Extra share of the heap by the lifetime of its blocks, for holes that no later block fills.

Fitted to the runs of `benchmarks/plan.py`.
"""


class Holder(NamedTuple):
    """A buffer: the role that owns it, its part and place, and a name within this kind."""

    role: str
    part: Part
    place: Place = "device"
    buffer: str = ""


class Share(NamedTuple):
    """Key of all buffers of one kind."""

    role: str
    part: Part
    place: Place


@dataclass(frozen=True)
class Peak:
    """The highest memory in use: bytes, time, and shares."""

    total: int = 0
    when: str = ""
    shares: dict[Share, int] = field(default_factory=dict)


class Ledger:
    """Bytes by holder, as a rank allocates and frees.

    when: current activity of the rank. peaks: by place. most: peak bytes per kind of buffer.
    moments: peak bytes of the device by activity.

    On a CPU rank both places are the same, and the process keeps the memory of freed small
    blocks: the C library reuses it in the next step (see `engine.memory`). Freed memory serves
    only blocks with the same lifetime: blocks of the models, of a step, or gathered for a module.
    """

    def __init__(self, device: str) -> None:
        self.when = ""
        self.peaks: dict[Place, Peak] = {"device": Peak(), "host": Peak()}
        self.most: dict[Share, int] = {}
        self.moments: dict[str, int] = {}
        self._is_cpu = device == "cpu"
        self._held: dict[Holder, Amount] = {}
        self._kept: dict[str, int] = {}

    def put(self, holder: Holder, amount: Amount) -> None:
        """Set the amount of a holder."""
        before = self._held.get(holder, NOTHING)
        self._held[holder] = amount
        if amount.small > before.small or amount.large > before.large:
            share = Share(*holder[:3])
            self.most[share] = max(self.most.get(share, 0), self._shares().get(share, 0))
            self._look()

    def add(self, holder: Holder, amount: Amount) -> None:
        """Add to the amount of a holder."""
        self.put(holder, self.of(holder).plus(amount))

    def drop(self, holder: Holder) -> None:
        """Free everything of a holder."""
        self.put(holder, NOTHING)

    def briefly(self, holder: Holder, amount: Amount) -> None:
        """Add to the amount of a holder and free the addition again."""
        before = self.of(holder)
        self.add(holder, amount)
        self.put(holder, before)

    def leave(self, role: str) -> None:
        """Free everything of a role."""
        for holder in [holder for holder in self._held if holder.role == role]:
            self.drop(holder)

    def of(self, holder: Holder) -> Amount:
        """Return the amount of a holder."""
        return self._held.get(holder, NOTHING)

    def _shares(self) -> dict[Share, int]:
        found: dict[Share, int] = {}
        for holder, amount in self._held.items():
            share = Share(*holder[:3])
            found[share] = found.get(share, 0) + amount.total
        return {share: total for share, total in found.items() if total}

    def _look(self) -> None:
        small: dict[str, int] = {}
        for holder, amount in self._held.items():
            lifetime = _LIFETIMES.get(holder.part, "step")
            small[lifetime] = small.get(lifetime, 0) + amount.small
        for lifetime, size in small.items():
            self._kept[lifetime] = max(self._kept.get(lifetime, 0), size)
        for place in ("device", "host"):
            total = self._total(place)
            if place == "device":
                self.moments[self.when] = max(self.moments.get(self.when, 0), total)
            if total > self.peaks[place].total:
                shares = self._shares()
                here = {s: size for s, size in shares.items() if self._is_cpu or s.place == place}
                self.peaks[place] = Peak(total, self.when, here)

    def _total(self, place: Place) -> int:
        """Return the bytes in use, on a CPU with the bytes that the heap keeps."""
        if self._is_cpu:
            large = sum(amount.large for amount in self._held.values())
            kept = sum(k * (1 + HOLES.get(lived, 0.0)) for lived, k in self._kept.items())
            return large + round(kept)
        return sum(amount.total for h, amount in self._held.items() if h.place == place)
