"""Where an engine's memory lies, and what a frozen model takes, sharded or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megakd.planning.cluster import Cluster
from megakd.planning.gathering import Coordinator, Gathered, Gathering
from megakd.planning.ledger import Holder, Ledger, Part, Place
from megakd.planning.moments import NOTHING, Amount, Inventory, Rehearsal, amount_of, block

_BUCKET = 500_000_000  # elements, DeepSpeed's default


@dataclass(kw_only=True)
class Setting:
    """A model in DeepSpeed's hands: whose it is, its `zero_optimization`, and where it runs.

    itemsize: bytes of a weight in the forward.
    moments: what the optimizer keeps of a weight, in numbers of fp32.
    owner: which of several models of this role it is.
    """

    role: str
    inventory: Inventory
    zero: Mapping[str, Any]
    itemsize: int
    cluster: Cluster
    ledger: Ledger
    moments: int = 2
    owner: str = ""

    @property
    def ranks(self) -> int:
        """How many share the model."""
        return self.cluster.ranks

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return int(self.zero.get("stage", 0))

    @property
    def is_cpu(self) -> bool:
        """Whether host and device are one."""
        return self.cluster.device == "cpu"

    def holder(self, part: Part, place: Place = "device", buffer: str = "") -> Holder:
        """Of this model."""
        return Holder(self.role, part, place, f"{self.owner}{buffer}")

    def place(self, offload: str) -> Place | None:
        """Where `offload_optimizer` or `offload_param` puts things; None: on a disk."""
        device = (self.zero.get(offload) or {}).get("device", "none")
        places: Mapping[str, Place | None] = {"none": "device", "cpu": "host", "nvme": None}
        return places[device]

    def share(self, numel: int) -> int:
        """A rank's part of so many elements, padded."""
        return -(-numel // self.ranks)

    def groups(self) -> list[int]:
        """Elements of the optimizer's groups: matrices, which decay, and vectors, which do not."""
        decays = sum(p.numel for p in self.inventory.parameters if p.decays)
        return [size for size in (decays, self.inventory.numel - decays) if size]

    def gradients(self, numbers: Sequence[int]) -> Amount:
        """Of some parameters, whole, each a block of its own."""
        numels = (self.inventory.parameters[number].numel for number in numbers)
        return amount_of(numel * self.itemsize for numel in numels)

    def bucket(self, name: str) -> int:
        """Elements of a communication buffer, on a CPU as far as it is ever written to."""
        elements = int(self.zero.get(name, _BUCKET))
        return min(elements, self.inventory.numel) if self.is_cpu else elements


def engine_of(setting: Setting) -> Whole | Shards:
    """A model at its ZeRO stage, without an optimizer."""
    return Shards(setting) if setting.stage == 3 else Whole(setting)


class Whole:
    """Weights in one piece on every rank."""

    def __init__(self, setting: Setting) -> None:
        self.at = setting

    def load(self) -> None:
        """Every rank reads the files, tensor by tensor, on the host; then the model moves."""
        at = self.at
        where = at.holder("weights", "device" if at.is_cpu else "host")
        read = at.holder("weights", "host", "read")
        for parameter in at.inventory.parameters:
            whole = block(parameter.numel * at.itemsize)
            at.ledger.add(where, whole)
            at.ledger.briefly(read, whole)
        if not at.is_cpu:
            at.ledger.put(at.holder("weights"), at.ledger.of(where))
            at.ledger.drop(where)

    def gathering(self, rehearsal: Rehearsal) -> Gathering:
        """Nothing is gathered."""
        return _nothing(rehearsal)


class Shards(Whole):
    """Weights in as many parts as there are ranks: ZeRO 3."""

    def load(self) -> None:
        """Shards, and one tensor whole: read by rank 0, gathered and broadcast."""
        at, place = self.at, self.at.place("offload_param")
        if place is not None:
            shards = at.inventory.sharded(at.ranks, at.itemsize)
            at.ledger.put(at.holder("weights", place), shards)
        largest = block(at.inventory.largest * at.itemsize)
        copies = 2 if at.is_cpu and at.ranks > 1 else 1  # gloo has a buffer of its own
        at.ledger.put(at.holder("gather"), largest.times(copies))
        at.ledger.briefly(at.holder("weights", "host", "read"), largest)
        at.ledger.drop(at.holder("gather"))

    def gathering(self, rehearsal: Rehearsal) -> Gathering:
        """What comes and goes while the model runs."""
        at = self.at
        if at.ranks == 1 and at.place("offload_param") == "device":
            return _nothing(rehearsal)
        plays = Coordinator(at.inventory, at.zero, itemsize=at.itemsize, in_place=not at.is_cpu)
        return plays.play(rehearsal.moments)


def _nothing(rehearsal: Rehearsal) -> Gathering:
    return Gathering(tuple(Gathered(NOTHING, NOTHING) for _ in rehearsal.moments), 0)
