"""Memory of DeepSpeed 0.19.8 for one model, frozen or trained, at each ZeRO stage.

The buffers, the times of their allocation, and their overlap are taken from DeepSpeed's sources.
AdamW keeps two fp32 moments per weight, SGD keeps none; bf16 and fp16 models also keep the
weights in fp32.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from megakd.planning.cluster import Cluster
from megakd.planning.gathering import Gathered, Gathering, gathering_of
from megakd.planning.ledger import Holding, Part, Place, Share, together
from megakd.planning.moments import Amount, Inventory, Trace, amount_of, block, mapped

FP32, FP64 = 4, 8
_BUCKET = 500_000_000  # elements, DeepSpeed's default
_SUB_GROUP = 1_000_000_000  # elements that ZeRO 3 updates at a time


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model under DeepSpeed: its role, its `zero_optimization`, and its machines.

    itemsize: bytes of a weight in the forward.
    moments: number of fp32 values that the optimizer keeps per weight.
    """

    role: str
    inventory: Inventory
    zero: Mapping[str, Any]
    itemsize: int
    cluster: Cluster
    moments: int = 2

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

    @property
    def is_gloo(self) -> bool:
        """True if several CPU ranks communicate, through gloo's buffers."""
        return self.is_cpu and self.ranks > 1

    def place(self, offload: str) -> Place | None:
        """Return the place that `offload_optimizer` or `offload_param` names; None means disk."""
        device = (self.zero.get(offload) or {}).get("device", "none")
        places: Mapping[str, Place | None] = {"none": "device", "cpu": "host", "nvme": None}
        return places[device]

    def held(self, part: Part, amount: Amount, place: Place | None = "device") -> Holding:
        """Return the holding of an amount; memory on a disk is not counted."""
        return {} if place is None else {Share(self.role, part, place): amount}

    def share(self, numel: int) -> int:
        """Return the padded share of a rank in `numel` elements."""
        return -(-numel // self.ranks)

    def groups(self) -> list[int]:
        """Return the elements per optimizer group: matrices (weight decay), vectors (no decay)."""
        decays = sum(p.numel for p in self.inventory.parameters if p.decays)
        return [size for size in (decays, self.inventory.numel - decays) if size]

    def bucket(self, name: str) -> int:
        """Return the elements of a communication buffer; on a CPU only the part that is written."""
        elements = int(self.zero.get(name, _BUCKET))
        return min(elements, self.inventory.numel) if self.is_cpu else elements

    def scratch(self, weights: Amount, largest: int) -> Amount:
        """Return the scratch memory of an update: AdamW's denominator, SGD's decayed gradient.

        Args:
            weights: memory of all tensors that are updated together, in fp32. A GPU updates them
                at once, with one copy.
            largest: elements of the largest tensor. A CPU updates tensor by tensor; AdamW
                then holds two copies.
        """
        return block(largest * FP32).times(2 if self.moments else 1) if self.is_cpu else weights


class Frozen:
    """A frozen model: whole weights on every rank, or at ZeRO 3 a shard on each rank."""

    def __init__(self, setting: Setting) -> None:
        self.at = setting

    def loading(self) -> Holding:
        """Return the most memory in use while the model is loaded tensor by tensor."""
        at = self.at
        if at.stage < 3:  # a tensor that is read is copied to the tensors before it
            sizes = [parameter.numel * at.itemsize for parameter in at.inventory.parameters]
            most = max(map(operator.add, accumulate(sizes), sizes), default=0)
            on_gpu = {} if at.is_cpu else Frozen.resting(self)
            return together(at.held("weights", mapped(most), "host"), on_gpu)
        largest = block(at.inventory.largest * at.itemsize)
        # Rank 0 reads a tensor, which all ranks gather; gloo adds a buffer.
        return together(
            Frozen.resting(self),
            at.held("gather", largest.times(2 if at.is_gloo else 1)),
            at.held("weights", largest, "host"),
        )

    def resting(self) -> Holding:
        """Return the memory in use while the model waits."""
        at = self.at
        if at.stage < 3:
            return at.held("weights", mapped(at.inventory.numel * at.itemsize))
        shards = at.inventory.sharded(at.ranks, at.itemsize)
        return at.held("weights", mapped(shards.total), at.place("offload_param"))

    def gathering(self, trace: Trace) -> Gathering:
        """Return the weights that ZeRO 3 gathers while the model runs."""
        at = self.at
        if at.stage < 3 or (at.ranks == 1 and at.place("offload_param") == "device"):
            return Gathering(tuple(Gathered() for _ in trace.moments), 0)
        return gathering_of(
            trace.moments, at.inventory, at.zero, itemsize=at.itemsize, in_place=not at.is_cpu
        )


class Trained(Frozen):
    """A trained model at ZeRO 0; the subclasses are the other stages."""

    def initializing(self) -> Holding:
        """Return the memory in use while DeepSpeed builds the engine; an update needs more."""
        return self.resting()

    def resting(self) -> Holding:
        """Return the memory in use between two steps, from the second step on."""
        at = self.at
        copies = at.moments + (at.itemsize < FP32)
        return together(
            super().resting(), at.held("optimizer", at.inventory.amount(FP32).times(copies))
        )

    def accumulated(self) -> Holding:
        """Return the additional memory of gradients between two micro-batches of a step."""
        return self.at.held("gradients", self.at.inventory.amount(self.at.itemsize))

    def backward(self, done: Inventory, *, adds: bool, last: bool = False) -> Holding:
        """Return the additional memory of gradients during a backward.

        Args:
            done: parameters with a complete gradient.
            adds: whether the gradients are added to those of an earlier backward of the step.
            last: whether this is the end of the step's last backward, where gradients are sent.
        """
        at = self.at
        own = self.accumulated() if adds else at.held("gradients", done.amount(at.itemsize))
        sent = min(at.inventory.numel, _BUCKET + at.inventory.largest) if last else 0
        return together(own, at.held("gradients", block(sent * at.itemsize)))

    def updating(self) -> Iterator[Holding]:
        """Yield the additional memory of each part of an update."""
        at = self.at
        whole = at.inventory.amount(FP32)
        yield together(
            self.accumulated(),
            at.held("gradients", whole) if at.itemsize < FP32 else {},
            at.held("optimizer", at.scratch(whole, at.inventory.largest)),
        )


class Divided(Trained):
    """ZeRO 1 and 2: whole weights in a flat buffer per group; the optimizer in shards."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._place: Place | None = setting.place("offload_optimizer")
        self._shard = amount_of(setting.share(group) * FP32 for group in setting.groups())
        self._touched = _most_touched(setting)

    def initializing(self) -> Holding:
        """Return the weights with a flat copy of a group."""
        at = self.at
        copied = at.held("weights", block(max(at.groups()) * at.itemsize))
        return together(Frozen.resting(self), copied)

    def resting(self) -> Holding:
        """Return the flat weights and the shard of the optimizer, wherever the shard is."""
        at, place = self.at, self._place
        weights = at.held("weights", amount_of(group * at.itemsize for group in at.groups()))
        optimizer = self._shard.times(1 + at.moments)
        if place == "device":
            return together(weights, at.held("optimizer", optimizer))
        narrow = amount_of(at.share(group) * at.itemsize for group in at.groups())
        largest = block(at.inventory.largest * at.itemsize)
        return together(
            weights,
            at.held("optimizer", optimizer.plus(narrow), place),
            at.held("gradients", largest),
            at.held("gradients", self._shard.plus(largest), place),
        )

    def accumulated(self) -> Holding:
        """Return the gradients: all at ZeRO 1, the overlap with the rank's shard at ZeRO 2."""
        return super().accumulated() if self.at.stage == 1 else self._own(self.at.inventory.numel)

    def backward(self, done: Inventory, *, adds: bool, last: bool = False) -> Holding:
        """Return the gradients; ZeRO 1 sends them at the end of a step, ZeRO 2 immediately."""
        sending = self._buckets(done, last=last)
        if self.at.stage == 1:
            return together(super().backward(done, adds=adds), sending if last else {})
        return together(self._own(done.numel), self.accumulated() if adds else {}, sending)

    def _own(self, done: int) -> Holding:
        """Return the gradients that overlap the rank's shard, among `done` elements."""
        at = self.at
        share = min(1.0, done / at.inventory.numel) if at.is_cpu else 1.0
        own = block(share * self._touched * at.itemsize)
        return at.held("gradients", own) if self._place == "device" else {}

    def _buckets(self, done: Inventory, *, last: bool) -> Holding:
        """Return the buckets; a bucket for several ranks is copied before it is sent."""
        at = self.at
        limit = int(at.zero.get("reduce_bucket_size", _BUCKET))
        filled = written = copied = 0
        for parameter in done.parameters:
            copied = 0
            if filled + parameter.numel > limit:
                copied, filled = filled, 0
            filled += parameter.numel
            # A gradient larger than the bucket is sent directly.
            written = max(written, filled if filled <= limit else 0)
        copied = max(copied, filled if last else 0) if at.ranks > 1 else 0
        # A GPU allocates a buffer at once; on a CPU it takes memory where it is written.
        share = written / limit if at.is_cpu else 1.0
        count = 2 if at.zero.get("overlap_comm") else 1
        buckets = block(limit * at.itemsize).times(share * count)
        return at.held("gradients", buckets.plus(block(copied * at.itemsize)))

    def updating(self) -> Iterator[Holding]:
        """Yield the memory of norm, flat fp32 gradients, scratch, and the gathered weights."""
        at = self.at
        if self._place == "device":
            largest = max(at.share(group) for group in at.groups())
            own, flat = self._own(at.inventory.numel), block(largest * FP32)
            yield together(own, at.held("gradients", block(at.inventory.largest * FP64)))
            yield together(own, at.held("gradients", flat))
            scratch = at.held("optimizer", at.scratch(flat, largest))
            yield together(at.held("gradients", flat), scratch)
        if at.is_gloo:  # gloo gathers the new weights through a buffer
            bucket = min(at.bucket("allgather_bucket_size"), at.inventory.numel)
            yield at.held("gather", block(bucket * at.itemsize))


class Sharded(Trained):
    """ZeRO 3: everything is sharded; weights are gathered while the model runs."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._place: Place | None = setting.place("offload_optimizer")
        self._sub_groups = _sub_groups(setting)
        self._bucket = block(setting.bucket("reduce_bucket_size") * setting.itemsize)

    def resting(self) -> Holding:
        """Return flat shards of weights, optimizer and gradients, and a bucket."""
        at, place, weights = self.at, self._place, self.at.place("offload_param")
        narrow = block(sum(at.share(p.numel) for p in at.inventory.parameters) * at.itemsize)
        in_fp32 = amount_of(size * FP32 for size in self._sub_groups)
        is_master = at.itemsize == FP32 and place == weights == "device"
        return together(
            at.held("weights", narrow, weights),
            at.held("optimizer", in_fp32.times(at.moments + (not is_master)), place),
            at.held("gradients", narrow.plus(in_fp32) if place == "host" else narrow, place),
            at.held("gradients", self._bucket),
        )

    def accumulated(self) -> Holding:
        """Return nothing: the shards of the gradients always exist."""
        return {}

    def backward(self, done: Inventory, *, adds: bool, last: bool = False) -> Holding:
        """Return the copies of the bucket that order gradients by rank."""
        del done, adds, last
        at, largest = self.at, self.at.inventory.largest
        # A gradient larger than the bucket is sent directly.
        direct = largest if largest > at.bucket("reduce_bucket_size") else 0
        copies = self._bucket.times(2 if at.is_gloo else 1)  # gloo adds a copy
        return at.held("gradients", copies.plus(block(direct * at.itemsize)))

    def updating(self) -> Iterator[Holding]:
        """Yield the memory of the norm, and of a sub-group: flat fp32 gradients and scratch."""
        at = self.at
        if self._place == "device":
            largest = max(self._sub_groups)
            flat = block(largest * FP32)
            yield at.held("gradients", block(at.share(at.inventory.largest) * FP64))
            yield at.held("gradients", flat.plus(at.scratch(flat, largest)))


def trained(setting: Setting) -> Trained:
    """Return the engine of a trained model at its ZeRO stage."""
    return (Trained, Divided, Divided, Sharded)[setting.stage](setting)


def _most_touched(setting: Setting) -> int:
    """Return the most elements, over ranks, of the parameters that overlap a rank's shard."""
    touched = [0] * setting.ranks
    for decays in (True, False):
        numels = [p.numel for p in setting.inventory.parameters if p.decays == decays]
        share, start = setting.share(sum(numels)), 0
        for numel in numels:
            for rank in range(start // share, (start + numel - 1) // share + 1):
                touched[rank] += numel
            start += numel
    return max(touched)


def _sub_groups(setting: Setting) -> list[int]:
    """Return the number of elements of each sub-group; sub-groups are updated in sequence."""
    most = int(setting.zero.get("sub_group_size", _SUB_GROUP))
    sizes: list[int] = []
    for decays in (True, False):
        size = 0
        for parameter in setting.inventory.parameters:
            if parameter.decays != decays:
                continue
            size += setting.share(parameter.numel)
            if size >= most:
                sizes.append(size)
                size = 0
        sizes += [size] if size else []
    return sizes
