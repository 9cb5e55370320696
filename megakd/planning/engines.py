"""Memory placement of an engine, and memory of a frozen model, sharded or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megakd.planning.cluster import Cluster
from megakd.planning.gathering import Coordinator, Gathered, Gathering
from megakd.planning.ledger import Holder, Ledger, Part, Place
from megakd.planning.moments import NOTHING, Amount, Inventory, Trace, amount_of, block, mapped

_BUCKET = 500_000_000  # elements, DeepSpeed's default


@dataclass(kw_only=True)
class Setting:
    """A model under DeepSpeed: its role, its `zero_optimization`, and its machines.

    itemsize: bytes of a weight in the forward.
    moments: number of fp32 values that the optimizer keeps per weight.
    owner: name that separates several models with the same role.
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
        """Number of ranks that share the model."""
        return self.cluster.ranks

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.zero.get("stage", 0))

    @property
    def is_cpu(self) -> bool:
        """True on a CPU, where host and device are the same."""
        return self.cluster.device == "cpu"

    def holder(self, part: Part, place: Place = "device", buffer: str = "") -> Holder:
        """Return a holder of this model."""
        return Holder(self.role, part, place, f"{self.owner}{buffer}")

    def place(self, offload: str) -> Place | None:
        """Return the place that `offload_optimizer` or `offload_param` names; None means disk."""
        device = (self.zero.get(offload) or {}).get("device", "none")
        places: Mapping[str, Place | None] = {"none": "device", "cpu": "host", "nvme": None}
        return places[device]

    def share(self, numel: int) -> int:
        """Return the padded share of a rank in `numel` elements."""
        return -(-numel // self.ranks)

    def groups(self) -> list[int]:
        """Return the elements per optimizer group: matrices (weight decay), vectors (no decay)."""
        decays = sum(p.numel for p in self.inventory.parameters if p.decays)
        return [size for size in (decays, self.inventory.numel - decays) if size]

    def gradients(self, numbers: Sequence[int]) -> Amount:
        """Return the memory of whole gradients of some parameters, one block per gradient."""
        numels = (self.inventory.parameters[number].numel for number in numbers)
        return amount_of(numel * self.itemsize for numel in numels)

    def bucket(self, name: str) -> int:
        """Return the elements of a communication buffer; on a CPU only the part that is written."""
        elements = int(self.zero.get(name, _BUCKET))
        return min(elements, self.inventory.numel) if self.is_cpu else elements


def engine_of(setting: Setting) -> Unsharded | ShardedWeights:
    """Return the engine of a model at its ZeRO stage, without an optimizer."""
    return ShardedWeights(setting) if setting.stage == 3 else Unsharded(setting)


class Unsharded:
    """Engine with whole weights on every rank."""

    def __init__(self, setting: Setting) -> None:
        self.at = setting

    def load(self) -> None:
        """Load the files tensor by tensor on the host of every rank, then move the model."""
        at = self.at
        where = at.holder("weights", "device" if at.is_cpu else "host")
        read = at.holder("weights", "host", "read")
        for parameter in at.inventory.parameters:
            whole = mapped(parameter.numel * at.itemsize)
            at.ledger.add(where, whole)
            at.ledger.briefly(read, whole)
        if not at.is_cpu:
            at.ledger.put(at.holder("weights"), at.ledger.of(where))
            at.ledger.drop(where)

    def gathering(self, trace: Trace) -> Gathering:
        """Return a gathering without gathered weights."""
        return _nothing(trace)


class ShardedWeights(Unsharded):
    """Engine with one shard of the weights per rank: ZeRO 3."""

    def load(self) -> None:
        """Load the shards, with one whole tensor at a time: read by rank 0, gathered, broadcast."""
        at, place = self.at, self.at.place("offload_param")
        if place is not None:
            shards = at.inventory.sharded(at.ranks, at.itemsize)
            at.ledger.put(at.holder("weights", place), mapped(shards.total))
        largest = block(at.inventory.largest * at.itemsize)
        copies = 2 if at.is_cpu and at.ranks > 1 else 1  # gloo adds a buffer
        at.ledger.put(at.holder("gather"), largest.times(copies))
        at.ledger.briefly(at.holder("weights", "host", "read"), largest)
        at.ledger.drop(at.holder("gather"))

    def gathering(self, trace: Trace) -> Gathering:
        """Return the weights that are gathered while the model runs."""
        at = self.at
        if at.ranks == 1 and at.place("offload_param") == "device":
            return _nothing(trace)
        plays = Coordinator(at.inventory, at.zero, itemsize=at.itemsize, in_place=not at.is_cpu)
        return plays.play(trace.moments)


def _nothing(trace: Trace) -> Gathering:
    return Gathering(tuple(Gathered(NOTHING, NOTHING) for _ in trace.moments), 0)
