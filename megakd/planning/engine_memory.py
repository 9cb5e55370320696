"""Memory of a rank: DeepSpeed 0.19.8's engines at each ZeRO stage, and the peak of their sum.

The buffers, the times of their allocation, and their overlap are taken from DeepSpeed's sources.
For N weights that learn, of P weights, with w bytes per weight in the forward, on R ranks:

stage   weights  optimizer    gradients in a backward        in an update
0       P w      4 N m        N w, and a bucket at the end   4 N if w < 4
1       P w      4 N m / R    N w, and buckets at the end    own gradients, 4 N / R
2       P w      4 N m / R    own gradients, and buckets     own gradients, 4 N / R
3       P w / R  4 N m / R    4 N / R, and buckets           4 N / R

m: the fp32 moments of a weight (AdamW 2, SGD 0), and 1 for a weight in fp32, which DeepSpeed keeps
for 16-bit models, at ZeRO 1 and 2, and with offload. At ZeRO 1 and 2 a rank's own gradients are
those of the weights that its shard overlaps, and 4 N / R in 16-bit models at ZeRO 2.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from megakd.planning.cluster import Cluster
from megakd.planning.tracing import NOTHING, Amount, Inventory, Trace, amount_of, block, mapped

Part = Literal[
    "weights",
    "gradients",
    "optimizer",
    "averages",
    "activations",
    "gather",
    "workspace",
    "elastic",
    "checkpoint",
]
PARTS: tuple[Part, ...] = get_args(Part)
Place = Literal["device", "host"]
_LIFETIMES = {
    **dict.fromkeys(("weights", "optimizer", "averages", "checkpoint"), "models"),
    "gather": "module",
}
HOLES = {"step": 0.4, "module": 0.1}
"""Extra share of the heap by the lifetime of its blocks, for holes that no later block fills.

Fitted to the runs of `python benchmarks memory.plan`.
"""
FP32, FP64 = 4, 8
_BUCKET = 500_000_000  # elements, DeepSpeed's default
_BILLION = 1_000_000_000  # elements; DeepSpeed's default of several limits of ZeRO 3


class Share(NamedTuple):
    """A kind of memory: the role that owns it, its part, and its place."""

    role: str
    part: Part
    place: Place = "device"


Holding: TypeAlias = Mapping[Share, Amount]
"""Memory in use at one time."""


def together(*holdings: Holding) -> dict[Share, Amount]:
    """Return the sum of several holdings."""
    total: dict[Share, Amount] = {}
    for holding in holdings:
        for share, amount in holding.items():
            total[share] = total.get(share, NOTHING).plus(amount)
    return total


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
        self._heap: Counter[str] = Counter()

    def look(self, when: str, *holdings: Holding) -> None:
        """Record what a rank holds at one time, during the activity `when`."""
        held = together(*holdings)
        shares = {share: amount.total for share, amount in held.items() if amount.total}
        self.most |= Counter(shares)  # the maximum of each
        on_cpu = self._with_heap(held) if self._is_cpu else 0
        for place, peak in self.peaks.items():
            here = {s: size for s, size in shares.items() if self._is_cpu or s.place == place}
            total = on_cpu if self._is_cpu else sum(here.values())
            if total > peak.total:
                self.peaks[place] = Peak(total, when, here)

    def _with_heap(self, held: Holding) -> int:
        small: Counter[str] = Counter()
        for share, amount in held.items():
            small[_LIFETIMES.get(share.part, "step")] += amount.small
        self._heap |= small
        kept = sum(size * (1 + HOLES.get(lived, 0.0)) for lived, size in self._heap.items())
        return sum(amount.large for amount in held.values()) + round(kept)


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
        return self.cluster.ranks

    @property
    def received(self) -> float:
        """The part of a gathered tensor that comes from other ranks."""
        return (self.ranks - 1) / self.ranks

    @property
    def stage(self) -> int:
        return int(self.zero.get("stage", 0))

    @property
    def is_cpu(self) -> bool:
        return self.cluster.device == "cpu"

    @property
    def copies(self) -> int:
        """Buffers of a collective: several CPU ranks add one of gloo."""
        return 2 if self.is_cpu and self.ranks > 1 else 1

    def place(self, offload: str) -> Place:
        is_away = (self.zero.get(offload) or {}).get("device") == "cpu"
        return "host" if is_away else "device"

    def share(self, numel: int) -> int:
        return -(-numel // self.ranks)

    def held(self, part: Part, amount: Amount, place: Place = "device") -> Holding:
        return {Share(self.role, part, place): amount}

    def loading(self) -> Holding:
        """Return the most memory in use while the model is loaded tensor by tensor."""
        if self.stage < 3:  # a tensor that is read is copied to the tensors before it
            sizes = [parameter.numel * self.itemsize for parameter in self.inventory]
            most = max(map(operator.add, accumulate(sizes), sizes), default=0)
            on_gpu = {} if self.is_cpu else Frozen.resting(self)
            return together(self.held("weights", mapped(most), "host"), on_gpu)
        # A rank reads its part of a tensor, and draws whole new tensors in fp32.
        largest = block(self.inventory.largest * FP32)
        return together(Frozen.resting(self), self.held("weights", largest, "host"))

    def resting(self) -> Holding:
        """Return the memory in use while the model waits."""
        if self.stage < 3:
            return self.held("weights", mapped(self.inventory.numel * self.itemsize))
        shard = mapped(self.share(self.inventory.numel) * self.itemsize)
        return self.held("weights", shard, self.place("offload_param"))

    def gathered(self, trace: Trace) -> list[Amount]:
        """Return the weights that ZeRO 3 gathers at each moment of a trace, with their buffer.

        From the third step on, DeepSpeed knows the order of all modules: every module prefetches a
        bucket of the weights that come next, up to a limit, and a weight stays whole until its last
        use. Weights beyond the limit leave earlier and are gathered again.
        """
        if not self._gathers:
            return [NOTHING] * len(trace.moments)
        used = [moment.used for moment in trace.moments]
        last = {n: now for now, numbers in enumerate(used) for n in numbers}
        order = list(dict.fromkeys(n for numbers in used for n in sorted(numbers)))
        place = {number: position for position, number in enumerate(order, start=1)}
        sizes = {number: trace.inventory[number].numel for number in order}
        amounts = {number: block(size * self.itemsize) for number, size in sizes.items()}
        # By the number of weights that were fetched: their elements, and their memory.
        ends = [0, *accumulate(sizes[number] for number in order)]
        memory = [NOTHING, *accumulate((amounts[number] for number in order), Amount.plus)]
        bucket, limit = self._limit("prefetch_bucket_size", 50_000_000), self._most_gathered
        persistent = self._limit("param_persistence_threshold", 100_000)
        has_backward = trace.turn + 1 < len(used)
        held = []
        before = released = 0
        left = NOTHING
        for now, numbers in enumerate(used):
            ahead = min(ends[before] + bucket, released + limit, ends[-1])
            count = max(before, bisect_left(ends, ahead), *(place[n] for n in numbers), 0)
            kept = memory[count].plus(left.times(-1))
            if has_backward:  # after a use in the forward, a weight may leave for a while
                most = max(limit, sum(sizes[number] for number in numbers))
                kept = kept.times(min(1.0, most / max(1, ends[count] - released)))
            # A GPU gathers a single weight in place.
            arriving = 0 if not self.is_cpu and count - before == 1 else ends[count] - ends[before]
            held.append(kept.plus(block(arriving * self.itemsize).times(self.copies)))
            for number in numbers:
                if last[number] == now and sizes[number] > persistent:
                    released, left = released + sizes[number], left.plus(amounts[number])
            before = count
        return held

    def fetched(self, trace: Trace) -> int:
        """Return the elements that ZeRO 3 gathers in a trace; 0 at the other stages.

        Every pass through the model but the first gathers the weights beyond the limit again.
        """
        total = trace.inventory.of(set().union(*(moment.used for moment in trace.moments))).numel
        if not self._gathers or not total:
            return 0
        forward, backward = trace.moments[: trace.turn], trace.moments[trace.turn + 1 :]
        read = sum(trace.inventory.of(moment.used).numel for moment in forward)
        passes = max(1, round(read / total)) * (2 if backward else 1)
        return total + (passes - 1) * max(0, total - self._most_gathered)

    @property
    def _gathers(self) -> bool:
        return self.stage == 3 and (self.ranks > 1 or self.place("offload_param") == "host")

    @property
    def _most_gathered(self) -> int:
        # Elements beside the active module: prefetched weights, and weights used soon again.
        soon = self._limit("max_reuse_distance") // 2
        has_prefetch = self._limit("prefetch_bucket_size", 50_000_000) > 0
        return max(soon, self._limit("max_live_parameters") if has_prefetch else 0)

    def _limit(self, name: str, default: int = _BILLION) -> int:
        return int(self.zero.get(f"stage3_{name}", self.zero.get(name, default)))


@dataclass(frozen=True, kw_only=True)
class Trained(Frozen):
    """A trained model; `moments` is the number of the optimizer's fp32 values per weight."""

    moments: int = 2

    @cached_property
    def learned(self) -> Inventory:
        return self.inventory.learned

    def initializing(self) -> Holding:
        """Return the memory in use while DeepSpeed builds the engine; an update needs more."""
        if self.stage not in (1, 2):
            return self.resting()
        return together(Frozen.resting(self), self.held("weights", self._flat))

    def resting(self) -> Holding:
        """Return the memory in use between two steps, from the second step on."""
        place = self.place("offload_optimizer")
        is_away = "host" in (place, self.place("offload_param"))
        has_masters = self.stage > 0 or self.itemsize < FP32 or is_away
        optimizer = self._shard.times(self.moments + has_masters)
        if self.stage == 0:
            return together(super().resting(), self.held("optimizer", optimizer))
        if self.stage == 3:
            shard = block(self.share(self.inventory.numel) * self.itemsize)
            return together(
                self.held("weights", shard, self.place("offload_param")),
                self.held("optimizer", optimizer, place),
                self.held("gradients", self._shard.times(2 if place == "host" else 1), place),
                self.held("gradients", self._bucket),
            )
        frozen = mapped((self.inventory.numel - self.learned.numel) * self.itemsize)
        weights = self.held("weights", self._flat.plus(frozen))
        if place == "device":
            return together(weights, self.held("optimizer", optimizer))
        narrow = block(self.share(self.learned.numel) * self.itemsize)
        largest = block(self.learned.largest * self.itemsize)
        return together(
            weights,
            self.held("optimizer", optimizer.plus(narrow), place),
            self.held("gradients", largest),
            self.held("gradients", self._shard.plus(largest), place),
        )

    def averages(self, numbers: Collection[int], values: int) -> Holding:
        """Return the values that a strategy keeps for each element of its shards.

        The values lie where the product of a weight and its gradient lies: beside the shards of the
        optimizer. At ZeRO 1 and 2 a shard may consist of these weights alone.
        """
        weights = self.inventory.of(numbers)
        most, shard = self.share(weights.numel), self.share(self.learned.numel)
        if self.stage in (1, 2):
            most = min(weights.numel, shard)
        part = most / max(1, weights.numel)
        amount = amount_of(parameter.numel * FP32 * part for parameter in weights)
        return self.held("averages", amount.times(values), self.place("offload_optimizer"))

    def copied(self, averages: Holding) -> Holding:
        """Return the copy of a rank's part of the state, which is written beside the training."""
        copy = block(self.share(self.learned.numel) * FP32).times(self.moments + 1)
        return together(
            *(self.held("checkpoint", amount, "host") for amount in (copy, *averages.values()))
        )

    def accumulated(self) -> Holding:
        """Return the additional memory of gradients between two micro-batches of a step."""
        if self.stage == 3:
            return {}
        if self.stage == 2:
            return self._gradients_of_shard(self.learned.numel)
        return self.held("gradients", self.learned.amount(self.itemsize))

    def backward(self, done: Inventory, *, adds: bool, last: bool = False) -> Holding:
        """Return the additional memory of gradients during a backward, complete for `done`.

        With `adds`, they are added to those of an earlier backward of the step; `last`: at the end
        of the step's last backward.
        """
        done = done.learned
        if self.stage == 3:  # the copies of the bucket that order gradients by rank
            largest = self.learned.largest  # if larger than the bucket, it is sent directly
            direct = largest if largest > self.bucket("reduce_bucket_size") else 0
            copies = self._bucket.times(self.copies).plus(block(direct * self.itemsize))
            return self.held("gradients", copies)
        if self.stage == 2:
            added = self.accumulated() if adds and not self._sums_in_place else {}
            shard = self._gradients_of_shard(done.numel)
            return together(shard, added, self._sent(done, last=last))
        whole = self.held("gradients", done.amount(self.itemsize))
        gradients = self.accumulated() if adds else whole
        if not last:
            return gradients
        if self.stage == 1:
            return together(gradients, self._sent(done, last=True))
        sent = min(self.learned.numel, _BUCKET + self.learned.largest)
        return together(gradients, self.held("gradients", block(sent * self.itemsize)))

    def updating(self) -> Iterator[Holding]:
        """Yield the additional memory of each part of an update: norm, fp32 gradients, scratch.

        The scratch memory is SGD's decayed gradient; fused AdamW has none.
        """
        if self.stage == 0:
            wide = self._shard if self.itemsize < FP32 else NOTHING
            # A CPU updates tensor by tensor, and a GPU all of them at once.
            decayed = block(self.learned.largest * FP32) if self.is_cpu else self._shard
            scratch = NOTHING if self.moments else decayed
            gradients = together(self.accumulated(), self.held("gradients", wide))
            yield together(gradients, self.held("optimizer", scratch))
            return
        if self.place("offload_optimizer") == "device":
            sub_group = int(self.zero.get("sub_group_size", _BILLION))
            size = self.share(self.learned.numel)
            is_sharded = self.stage == 3
            flat = block((min(size, sub_group) if is_sharded else size) * FP32)
            shard = {} if is_sharded else self._gradients_of_shard(self.learned.numel)
            yield self._with_norm()
            yield together(shard, {} if self._sums_in_place else self.held("gradients", flat))
            scratch = NOTHING if self.moments else flat
            yield together(self.held("gradients", flat), self.held("optimizer", scratch))
        if self.stage < 3 and self.copies > 1:  # gloo gathers the new weights through a buffer
            yield self.held("gather", block(self.bucket("allgather_bucket_size") * self.itemsize))

    def bucket(self, name: str) -> int:
        """Return the elements of a communication buffer; on a CPU only the part that is written."""
        elements = int(self.zero.get(name, _BUCKET))
        return min(elements, self.learned.numel) if self.is_cpu else elements

    @property
    def _bucket(self) -> Amount:
        return block(self.bucket("reduce_bucket_size") * self.itemsize)

    @property
    def _flat(self) -> Amount:
        return block(self.learned.numel * self.itemsize)

    @property
    def _shard(self) -> Amount:
        # The rank's part of one fp32 value for every weight that learns.
        if self.stage == 0:
            return self.learned.amount(FP32)
        return block(self.share(self.learned.numel) * FP32)

    @property
    def _sums_in_place(self) -> bool:
        # True if gradients are added to one fp32 buffer of the rank's shard.
        # 16-bit models at ZeRO 2 do so, on the device also with offload, until the update
        # (`_build_compact_grad_partition_buffer` of DeepSpeed).
        return self.stage == 2 and self.itemsize < FP32

    def _with_norm(self) -> Holding:
        # Gradients, and one of them in fp64, of the rank that has the most of both together.
        if self.stage == 3:
            return self.held("gradients", block(self.share(self.learned.largest) * FP64))
        size, itemsize = self.share(self.learned.numel), self._itemsize_of_gradients
        most = max(
            (size if self._sums_in_place else overlapping) * itemsize + largest * FP64
            for overlapping, largest in self._shards
        )
        return self.held("gradients", block(most))

    def _gradients_of_shard(self, done: int) -> Holding:
        if self._sums_in_place:
            return self.held("gradients", self._shard)
        if self.place("offload_optimizer") == "host":
            return {}
        share = min(1.0, done / self.learned.numel) if self.is_cpu else 1.0
        size = share * self._most_overlapping * self._itemsize_of_gradients
        return self.held("gradients", block(size))

    @property
    def _itemsize_of_gradients(self) -> int:
        return FP32 if self.stage == 2 else self.itemsize  # ZeRO 2 adds gradients up in fp32

    @cached_property
    def _most_overlapping(self) -> int:
        return max(overlapping for overlapping, _ in self._shards)

    @cached_property
    def _shards(self) -> list[tuple[int, int]]:
        # Elements of each rank's shard, one after the other in the order of the weights: of the
        # weights that it overlaps, also where it has only a part of them, and of the largest part.
        size, start = self.share(self.learned.numel), 0
        shards = [(0, 0)] * self.ranks
        for parameter in self.learned:
            stop = start + parameter.numel
            for rank in range(start // size, (stop - 1) // size + 1):
                part = min(stop, (rank + 1) * size) - max(start, rank * size)
                overlapping, largest = shards[rank]
                shards[rank] = (overlapping + parameter.numel, max(largest, part))
            start = stop
        return shards

    def _sent(self, done: Inventory, *, last: bool) -> Holding:
        # Return the buckets, and the copy of one that is sent now: a gradient did not fit into it.
        # A gradient that is larger than the bucket is sent directly.
        limit = int(self.zero.get("reduce_bucket_size", _BUCKET))
        newest = done[-1].numel if done else 0
        before = done.numel - newest
        written = before if before <= limit < done.numel else min(limit, done.numel)
        is_full = done.numel > limit and (done.numel - 1) % limit < newest
        copied = (before % limit or limit) if is_full else 0
        copied = max(copied, done.numel % limit if last else 0, newest if newest > limit else 0)
        # A GPU allocates a bucket at once; on a CPU it takes memory where it is written.
        share = written / limit if self.is_cpu else 1.0
        count = 2 if self.zero.get("overlap_comm") else 1
        buckets = block(limit * self.itemsize).times(share * count)
        copy = block(copied * self.itemsize if self.ranks > 1 else 0)
        return self.held("gradients", buckets.plus(copy))
