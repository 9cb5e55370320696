"""Memory of DeepSpeed 0.19.8 for one model, frozen or trained, at each ZeRO stage.

The buffers, the times of their allocation, and their overlap are taken from DeepSpeed's sources.
AdamW keeps two fp32 moments per weight, SGD keeps none; bf16 and fp16 models also keep the
weights in fp32.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from megakd.planning.cluster import Cluster
from megakd.planning.gathering import Gathered, Gathering, gathering_of
from megakd.planning.ledger import Holding, Part, Place, Share, together
from megakd.planning.moments import NOTHING, Amount, Inventory, Trace, amount_of, block, mapped

FP32, FP64 = 4, 8
_BUCKET = 500_000_000  # elements, DeepSpeed's default
_SUB_GROUP = 1_000_000_000  # elements that ZeRO 3 updates at a time


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A frozen model: whole weights on every rank, or at ZeRO 3 a shard on each rank.

    zero: the section `zero_optimization` of the DeepSpeed config.
    itemsize: bytes of a weight in the forward.
    cluster: the ranks that share the model: all, or those of one node.
    """

    role: str
    inventory: Inventory
    zero: Mapping[str, Any]
    itemsize: int
    cluster: Cluster

    @property
    def ranks(self) -> int:
        """Number of ranks that share the model."""
        return self.cluster.ranks

    @property
    def received(self) -> float:
        """The part of a gathered tensor that comes from other ranks."""
        return (self.ranks - 1) / self.ranks

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

    def loading(self) -> Holding:
        """Return the most memory in use while the model is loaded tensor by tensor."""
        if self.stage < 3:  # a tensor that is read is copied to the tensors before it
            sizes = [parameter.numel * self.itemsize for parameter in self.inventory]
            most = max(map(operator.add, accumulate(sizes), sizes), default=0)
            on_gpu = {} if self.is_cpu else Frozen.resting(self)
            return together(self.held("weights", mapped(most), "host"), on_gpu)
        largest = block(self.inventory.largest * self.itemsize)
        # Rank 0 reads a tensor, which all ranks gather; gloo adds a buffer.
        return together(
            Frozen.resting(self),
            self.held("gather", largest.times(2 if self.is_gloo else 1)),
            self.held("weights", largest, "host"),
        )

    def resting(self) -> Holding:
        """Return the memory in use while the model waits."""
        if self.stage < 3:
            return self.held("weights", mapped(self.inventory.numel * self.itemsize))
        shards = self.inventory.sharded(self.ranks, self.itemsize)
        return self.held("weights", mapped(shards.total), self.place("offload_param"))

    def gathering(self, trace: Trace) -> Gathering:
        """Return the weights that ZeRO 3 gathers while the model runs."""
        if self.stage < 3 or (self.ranks == 1 and self.place("offload_param") == "device"):
            return Gathering(tuple(Gathered() for _ in trace.moments), 0)
        in_place = not self.is_cpu
        return gathering_of(trace, self.zero, itemsize=self.itemsize, in_place=in_place)


@dataclass(frozen=True, kw_only=True)
class Trained(Frozen):
    """A trained model at ZeRO 0; the subclasses are the other stages.

    moments: number of fp32 values that the optimizer keeps per weight.
    """

    moments: int = 2

    @cached_property
    def learned(self) -> Inventory:
        """The weights that learn; the others have no gradient and no optimizer state."""
        return self.inventory.learned

    def initializing(self) -> Holding:
        """Return the memory in use while DeepSpeed builds the engine; an update needs more."""
        return self.resting()

    def resting(self) -> Holding:
        """Return the memory in use between two steps, from the second step on."""
        copies = self.moments + (self.itemsize < FP32)
        return together(
            super().resting(), self.held("optimizer", self.learned.amount(FP32).times(copies))
        )

    def averages(self, numbers: Collection[int], values: int) -> Holding:
        """Return the values that a strategy keeps for each element of its shards.

        The values lie where the product of a weight and its gradient lies: beside the shards of the
        optimizer, or on the host if these are on a disk.

        Args:
            numbers: numbers of the weights for which values are kept.
            values: number of fp32 values per element.
        """
        own = amount_of(size * FP32 for size in self._own_sizes(numbers))
        place = self.place("offload_optimizer") or "host"
        return self.held("averages", own.times(values), place)

    def _own_sizes(self, numbers: Collection[int]) -> list[int]:
        """Return the elements of the rank's shards of some weights; ZeRO 0 divides them too."""
        return [self.share(parameter.numel) for parameter in self.inventory.of(numbers)]

    def accumulated(self) -> Holding:
        """Return the additional memory of gradients between two micro-batches of a step."""
        return self.held("gradients", self.learned.amount(self.itemsize))

    def backward(self, done: Inventory, *, adds: bool, last: bool = False) -> Holding:
        """Return the additional memory of gradients during a backward.

        Args:
            done: parameters with a complete gradient.
            adds: whether the gradients are added to those of an earlier backward of the step.
            last: whether this is the end of the step's last backward, where gradients are sent.
        """
        done = done.learned
        own = self.accumulated() if adds else self.held("gradients", done.amount(self.itemsize))
        sent = min(self.learned.numel, _BUCKET + self.learned.largest) if last else 0
        return together(own, self.held("gradients", block(sent * self.itemsize)))

    def updating(self) -> Iterator[Holding]:
        """Yield the additional memory of each part of an update."""
        whole = self.learned.amount(FP32)
        yield together(
            self.accumulated(),
            self.held("gradients", whole) if self.itemsize < FP32 else {},
            self.held("optimizer", self.scratch(whole, self.learned.largest)),
        )

    def share(self, numel: int) -> int:
        """Return the padded share of a rank in `numel` elements."""
        return -(-numel // self.ranks)

    @cached_property
    def groups(self) -> list[list[int]]:
        """The parameters' elements by optimizer group: with weight decay, then without."""
        groups = ([p.numel for p in self.learned if p.decays == decays] for decays in (True, False))
        return [group for group in groups if group]

    def bucket(self, name: str) -> int:
        """Return the elements of a communication buffer; on a CPU only the part that is written."""
        elements = int(self.zero.get(name, _BUCKET))
        return min(elements, self.learned.numel) if self.is_cpu else elements

    def scratch(self, weights: Amount, largest: int) -> Amount:
        """Return the scratch memory of an update: SGD's decayed gradient; fused AdamW has none.

        Args:
            weights: memory of all tensors that are updated together, in fp32. A GPU updates them
                at once, with one copy.
            largest: elements of the largest tensor. A CPU updates tensor by tensor.
        """
        if self.moments:
            return NOTHING
        return block(largest * FP32) if self.is_cpu else weights


class Divided(Trained):
    """ZeRO 1 and 2: whole weights in a flat buffer per group; the optimizer in shards."""

    def initializing(self) -> Holding:
        """Return the weights with a flat copy of a group."""
        copied = self.held("weights", block(max(self._sizes) * self.itemsize))
        return together(Frozen.resting(self), copied)

    def resting(self) -> Holding:
        """Return the flat weights and the shard of the optimizer, wherever the shard is."""
        place = self.place("offload_optimizer")
        flat = amount_of(size * self.itemsize for size in self._sizes)
        frozen = mapped((self.inventory.numel - self.learned.numel) * self.itemsize)
        weights = self.held("weights", flat.plus(frozen))
        optimizer = self._shard.times(1 + self.moments)
        if place == "device":
            return together(weights, self.held("optimizer", optimizer))
        narrow = amount_of(self.share(size) * self.itemsize for size in self._sizes)
        largest = block(self.learned.largest * self.itemsize)
        return together(
            weights,
            self.held("optimizer", optimizer.plus(narrow), place),
            self.held("gradients", largest),
            self.held("gradients", self._shard.plus(largest), place),
        )

    def accumulated(self) -> Holding:
        """Return the gradients: all at ZeRO 1, the overlap with the rank's shard at ZeRO 2."""
        return super().accumulated() if self.stage == 1 else self._own(self.learned.numel)

    def backward(self, done: Inventory, *, adds: bool, last: bool = False) -> Holding:
        """Return the gradients; ZeRO 1 sends them at the end of a step, ZeRO 2 immediately."""
        sending = self._buckets(done, last=last)
        if self.stage == 1:
            return together(super().backward(done, adds=adds), sending if last else {})
        added = self.accumulated() if adds and not self._sums_in_place else {}
        return together(self._own(done.learned.numel), added, sending)

    @property
    def _sums_in_place(self) -> bool:
        """True if gradients are added to one fp32 buffer of the rank's shard.

        16-bit models at ZeRO 2 do so, on the device also with offload, until the update
        (`_build_compact_grad_partition_buffer` of DeepSpeed).
        """
        return self.stage == 2 and self.itemsize < FP32

    def _own(self, done: int) -> Holding:
        if self._sums_in_place:
            return self.held("gradients", self._shard)
        share = min(1.0, done / self.learned.numel) if self.is_cpu else 1.0
        # ZeRO 2 adds up its gradients in fp32.
        itemsize = FP32 if self.stage == 2 else self.itemsize
        own = block(share * self._touched * itemsize)
        return self.held("gradients", own) if self.place("offload_optimizer") == "device" else {}

    def _buckets(self, done: Inventory, *, last: bool) -> Holding:
        limit = int(self.zero.get("reduce_bucket_size", _BUCKET))
        filled = written = copied = 0
        for parameter in done.learned:
            copied = 0
            if filled + parameter.numel > limit:
                copied, filled = filled, 0
            filled += parameter.numel
            # A gradient larger than the bucket is sent directly.
            written = max(written, filled if filled <= limit else 0)
        copied = max(copied, filled if last else 0) if self.ranks > 1 else 0
        # A GPU allocates a buffer at once; on a CPU it takes memory where it is written.
        share = written / limit if self.is_cpu else 1.0
        count = 2 if self.zero.get("overlap_comm") else 1
        buckets = block(limit * self.itemsize).times(share * count)
        return self.held("gradients", buckets.plus(block(copied * self.itemsize)))

    def updating(self) -> Iterator[Holding]:
        """Yield the memory of norm, flat fp32 gradients, scratch, and the gathered weights."""
        if self.place("offload_optimizer") == "device":
            largest = max(self.share(size) for size in self._sizes)
            own, flat = self._own(self.learned.numel), block(largest * FP32)
            yield together(own, self.held("gradients", block(self.learned.largest * FP64)))
            yield own if self._sums_in_place else together(own, self.held("gradients", flat))
            scratch = self.held("optimizer", self.scratch(flat, largest))
            yield together(self.held("gradients", flat), scratch)
        if self.is_gloo:  # gloo gathers the new weights through a buffer
            yield self.held("gather", block(self.bucket("allgather_bucket_size") * self.itemsize))

    @cached_property
    def _sizes(self) -> list[int]:
        return [sum(group) for group in self.groups]

    @property
    def _shard(self) -> Amount:
        return amount_of(self.share(size) * FP32 for size in self._sizes)

    @cached_property
    def _touched(self) -> int:
        touched = [0] * self.ranks
        for rank, number, _ in self._pieces():
            touched[rank] += self.inventory[number].numel
        return max(touched)

    def _own_sizes(self, numbers: Collection[int]) -> list[int]:
        """Return the parts of some weights in the shard of the rank that has the most of them."""
        own: list[list[int]] = [[] for _ in range(self.ranks)]
        for rank, number, size in self._pieces():
            if number in numbers:
                own[rank].append(size)
        return max(own, key=sum)

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yield rank, number of the weight, and elements of each part of a weight in a shard."""
        for decays in (True, False):
            numbers = [
                number
                for number, parameter in enumerate(self.inventory)
                if parameter.learns and parameter.decays == decays
            ]
            share, start = self.share(self.inventory.of(numbers).numel), 0
            for number in numbers:
                stop = start + self.inventory[number].numel
                for rank in range(start // share, (stop - 1) // share + 1):
                    first, last = max(start, rank * share), min(stop, (rank + 1) * share)
                    yield rank, number, last - first
                start = stop


class Sharded(Trained):
    """ZeRO 3: everything is sharded; weights are gathered while the model runs."""

    def resting(self) -> Holding:
        """Return flat shards of weights, optimizer and gradients, and a bucket."""
        place, weights = self.place("offload_optimizer"), self.place("offload_param")
        elements, learned = (
            sum(self.share(p.numel) for p in known) for known in (self.inventory, self.learned)
        )
        narrow, sums = block(elements * self.itemsize), block(learned * FP32)
        in_fp32 = amount_of(size * FP32 for size in self._sub_groups)
        is_master = self.itemsize == FP32 and place == weights == "device"
        return together(
            self.held("weights", narrow, weights),
            self.held("optimizer", in_fp32.times(self.moments + (not is_master)), place),
            self.held("gradients", sums.plus(in_fp32) if place == "host" else sums, place),
            self.held("gradients", self._bucket),
        )

    def accumulated(self) -> Holding:
        """Return nothing: the shards of the gradients always exist."""
        return {}

    def backward(self, done: Inventory, *, adds: bool, last: bool = False) -> Holding:
        """Return the copies of the bucket that order gradients by rank."""
        largest = self.learned.largest
        # A gradient larger than the bucket is sent directly.
        direct = largest if largest > self.bucket("reduce_bucket_size") else 0
        copies = self._bucket.times(2 if self.is_gloo else 1)  # gloo adds a copy
        return self.held("gradients", copies.plus(block(direct * self.itemsize)))

    def updating(self) -> Iterator[Holding]:
        """Yield the memory of the norm, and of a sub-group: flat fp32 gradients and scratch."""
        if self.place("offload_optimizer") == "device":
            largest = max(self._sub_groups)
            flat = block(largest * FP32)
            yield self.held("gradients", block(self.share(self.learned.largest) * FP64))
            yield self.held("gradients", flat.plus(self.scratch(flat, largest)))

    @cached_property
    def _sub_groups(self) -> list[int]:
        most = int(self.zero.get("sub_group_size", _SUB_GROUP))
        sizes: list[int] = []
        for group in self.groups:
            size = 0
            for numel in group:
                size += self.share(numel)
                if size >= most:
                    sizes.append(size)
                    size = 0
            sizes += [size] if size else []
        return sizes

    @property
    def _bucket(self) -> Amount:
        return block(self.bucket("reduce_bucket_size") * self.itemsize)


def trained(zero: Mapping[str, Any], **model: Any) -> Trained:
    """Return the engine of a trained model at its ZeRO stage; `model`: fields of `Trained`."""
    engine = (Trained, Divided, Divided, Sharded)[int(zero.get("stage", 0))]
    return engine(zero=zero, **model)
