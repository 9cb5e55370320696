"""Memory of a rank: DeepSpeed 0.19.8's engines at each ZeRO stage, and the peak of their sum.

The buffers, the times of their allocation, and their overlap are taken from DeepSpeed's sources.
For N weights that learn, of P weights, with w bytes per weight in the forward, on R ranks:

stage   weights  optimizer    gradients in a backward        in an update
0       P w      4 N m        N w, and a bucket at the end   4 N if w < 4
1       P w      4 N m / R    N w, and buckets at the end    own gradients, 4 N / R
2       P w      4 N m / R    own gradients, and buckets     own gradients, 4 N / R
3       P w / R  4 N m / R    4 N / R, and buckets           4 N / R

m: the fp32 moments of a weight (AdamW 2, SGD 0), and 1 for a weight in fp32, which DeepSpeed keeps
for 16-bit models, at ZeRO 1 to 3, and with offload. At ZeRO 1 and 2 a rank's own gradients are
those of the weights that its shard overlaps, and 4 N / R in 16-bit models at ZeRO 2.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from megakd.planning.tracing import NOTHING, Amount, Trace, blocks, mapped

Part = Literal["weights", "gradients", "optimizer", "activations", "gather", "checkpoint"]
PARTS: tuple[Part, ...] = get_args(Part)
Place = Literal["device", "host"]
_LIFETIMES = {"weights": 0, "optimizer": 0, "checkpoint": 0, "gather": 1}
_HEADROOM = 1.08
"""Factor of the memory of CPU ranks: a plan that is too low is worse than one that is too high.

The same run takes 2 to 5 % more or less from one time to the next.
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
            total[share] = total.get(share, NOTHING) + amount
    return total


@dataclass(frozen=True)
class Peak:
    """The highest memory in use: bytes, time, and shares."""

    total: int = 0
    when: str = ""
    shares: Mapping[Share, int] = field(default_factory=dict)


class Ledger:
    """The peaks of a rank by place, and the most bytes of each share.

    On a CPU rank both places are the same, and the process keeps the memory of freed small
    blocks: the C library reuses it in the next step (see `engine.memory`). Freed memory serves
    only blocks with the same lifetime: blocks of the models, of a step, or gathered for a module.
    Holes that no later block fills take 40 and 10 % of the last two. `process`: bytes of the host
    without models, which count in its peak.
    """

    def __init__(self, device: str, process: int) -> None:
        self.peaks: dict[Place, Peak] = {"device": Peak(), "host": Peak()}
        self.most: Counter[Share] = Counter()
        self._is_cpu, self._process = device == "cpu", process
        self._heap = np.zeros(3)

    def look(self, when: str, *holdings: Holding) -> None:
        """Record what a rank holds at one time, during the activity `when`."""
        held = together(*holdings)
        shares = {share: int(amount.sum()) for share, amount in held.items() if amount.any()}
        self.most |= Counter(shares)  # the maximum of each
        on_cpu = 0
        if self._is_cpu:
            small = np.zeros(3)
            for share, amount in held.items():
                small[_LIFETIMES.get(share.part, 2)] += amount[0]
            self._heap = np.maximum(self._heap, small)
            heap = float(self._heap @ (1.0, 1.1, 1.4))
            on_cpu = round(_HEADROOM * (heap + sum(float(amount[1]) for amount in held.values())))
        for place, peak in self.peaks.items():
            here = {s: size for s, size in shares.items() if self._is_cpu or s.place == place}
            total = on_cpu if self._is_cpu else sum(here.values())
            total += self._process if self._is_cpu or place == "host" else 0
            if total > peak.total:
                self.peaks[place] = Peak(total, when, here)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A model on a rank: whole weights, or at ZeRO 3 a shard.

    sizes, learned: elements of its weights, and of those that learn, in order.
    zero: the section `zero_optimization` of the DeepSpeed config.
    itemsize: bytes of a weight in the forward.
    ranks: those that share the model.
    moments: fp32 values per weight of the optimizer; None: the model is frozen.
    """

    role: str
    sizes: Sequence[int]
    learned: Sequence[int] = ()
    zero: Mapping[str, Any]
    itemsize: int
    ranks: int
    is_cpu: bool
    moments: int | None = None

    @cached_property
    def numel(self) -> int:
        return sum(self.sizes)

    @cached_property
    def count(self) -> int:
        """The number of weights that learn."""
        return sum(self.learned)

    @property
    def stage(self) -> int:
        return int(self.zero.get("stage", 0))

    @property
    def copies(self) -> int:
        """Buffers of a collective: several CPU ranks add one of gloo."""
        return 2 if self.is_cpu and self.ranks > 1 else 1

    def place(self, offload: str) -> Place:
        return "host" if (self.zero.get(offload) or {}).get("device") == "cpu" else "device"

    def share(self, numel: int) -> int:
        return -(-numel // self.ranks)

    def held(self, part: Part, amount: Amount, place: Place = "device") -> Holding:
        return {Share(self.role, part, place): amount}

    def _frozen(self) -> Holding:
        sharded = self.stage == 3
        size = (self.share(self.numel) if sharded else self.numel) * self.itemsize
        return self.held(
            "weights", mapped(size), self.place("offload_param") if sharded else "device"
        )

    def loading(self) -> Holding:
        """Return the most memory in use while the model is loaded tensor by tensor."""
        if self.stage == 3:  # a rank reads its part of a tensor, and draws whole ones in fp32
            largest = blocks(max(self.sizes) * FP32)
            return together(self._frozen(), self.held("weights", largest, "host"))
        # A tensor that is read is copied to the tensors before it.
        most = max(map(operator.add, accumulate(self.sizes), self.sizes))
        on_gpu = {} if self.is_cpu else self._frozen()
        return together(self.held("weights", mapped(most * self.itemsize), "host"), on_gpu)

    def resting(self) -> Holding:
        """Return the memory in use between two steps, from the second step on."""
        if self.moments is None:
            return self._frozen()
        place, shard, width = self.place("offload_optimizer"), self._shard, self.itemsize
        is_away = "host" in (place, self.place("offload_param"))
        has_masters = self.stage > 0 or width < FP32 or is_away
        optimizer = self.held("optimizer", shard * (self.moments + has_masters), place)
        if self.stage == 0:
            return together(self._frozen(), optimizer)
        if self.stage == 3:
            weights = blocks(self.share(self.numel) * width)
            return together(
                self.held("weights", weights, self.place("offload_param")),
                optimizer,
                self.held("gradients", shard * (2 if place == "host" else 1), place),
                self.held("gradients", blocks(self._bucket(self.count) * width)),
            )
        whole = blocks(self.count * width) + mapped((self.numel - self.count) * width)
        weights = self.held("weights", whole)
        if place == "device":
            return together(weights, optimizer)
        largest, narrow = blocks(max(self.learned) * width), shard * (width / FP32)
        away = self.held("gradients", shard + narrow + largest, place)
        return together(weights, optimizer, away, self.held("gradients", largest))

    def averages(self, weights: int, values: int) -> Holding:
        """Return `values` that a strategy keeps beside the optimizer for some of the weights."""
        # At ZeRO 1 and 2 a shard may consist of these weights alone.
        share = self.share(self.count if self.stage in (1, 2) else weights)
        amount = values * blocks(min(weights, share) * FP32)
        return self.held("optimizer", amount, self.place("offload_optimizer"))

    def backward(self, done: int, newest: int, *, adds: bool, last: bool = False) -> Holding:
        """Return the additional memory of gradients in a backward, complete for `done` elements.

        newest: elements of the newest of them. With `adds`, they are added to those of an earlier
        backward of the step; `last`: at the end of the step's last backward.
        """
        limit, width = self._limit("reduce_bucket_size", _BUCKET), self.itemsize
        largest = max(self.learned)
        direct = largest if largest > limit else 0  # it is sent without the bucket
        if self.stage == 3:  # the copies of the bucket that order gradients by rank
            buckets = self.copies * blocks(self._bucket(self.count) * width)
            return self.held("gradients", buckets + blocks(direct * width))
        gradients = self.gradients(self.count if adds and self.stage < 2 else done)
        if adds and self.stage == 2 and not self._sums_in_place:
            gradients = together(gradients, self.gradients(self.count))
        if self.stage < 2 and not last:
            return gradients
        if self.stage == 0:
            sent = blocks(min(self.count, _BUCKET + largest) * width)
            return together(gradients, self.held("gradients", sent))
        # A bucket is copied before it is sent: if a gradient does not fit into it, and at the end.
        is_full = done > limit and (done - 1) % limit < newest
        copied = (done - newest) % limit or limit if is_full else 0
        copied = max(copied, done % limit if last else 0, newest if newest > limit else 0)
        copy = blocks(copied * width if self.ranks > 1 else 0)
        before = done - newest  # what the bucket has when a gradient does not fit
        written = self._bucket(before if before <= limit < done else done)
        buckets = blocks(written * width) * (2 if self.zero.get("overlap_comm") else 1)
        return together(gradients, self.held("gradients", buckets + copy))

    def gradients(self, done: int) -> Holding:
        """Return the gradients of a rank that are complete for `done` elements, without buckets."""
        if self.stage == 3:
            return {}
        part = done / self.count
        if self.stage == 2:
            return self._own(part if self.is_cpu else 1.0)
        return self.held("gradients", part * blocks(*(n * self.itemsize for n in self.learned)))

    def _own(self, part: float = 1.0, norm: int = 0) -> Holding:
        # Gradients of the weights that a shard overlaps, also where it has only a part of them, and
        # `norm` bytes for each element of its largest part; of the rank that has the most.
        if self.place("offload_optimizer") == "host" and not self._sums_in_place:
            return {}
        size, ends, most = self.share(self.count), [0, *accumulate(self.learned)], 0.0
        width = FP32 if self.stage == 2 else self.itemsize  # ZeRO 2 adds up in fp32
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            first, last = bisect_right(ends, start) - 1, bisect_left(ends, stop)
            parts = (min(ends[n + 1], stop) - max(ends[n], start) for n in range(first, last))
            elements = size if self._sums_in_place else part * (ends[last] - ends[first])
            most = max(most, elements * width + max(parts) * norm)
        return self.held("gradients", blocks(most))

    def updating(self) -> Iterator[Holding]:
        """Yield the additional memory of each part of an update: norm, fp32 gradients, gather.

        SGD also holds its decayed gradient; fused AdamW has no scratch memory.
        """
        scratch, largest = self.moments == 0, max(self.learned)
        if self.stage == 0:
            wide = self._shard if self.itemsize < FP32 else NOTHING
            # A CPU updates tensor by tensor, and a GPU all of them at once.
            decayed = blocks(largest * FP32) if self.is_cpu else self._shard
            yield together(
                self.gradients(self.count),
                self.held("gradients", wide),
                self.held("optimizer", decayed * scratch),
            )
            return
        if self.place("offload_optimizer") == "device":
            size, own = self.share(self.count), self._own() if self.stage < 3 else {}
            if self.stage == 3:
                size = min(size, int(self.zero.get("sub_group_size", _BILLION)))
                yield self.held("gradients", blocks(self.share(largest) * FP64))  # the norm
            else:
                yield self._own(norm=FP64)
            flat = blocks(size * FP32)
            yield together(own, {} if self._sums_in_place else self.held("gradients", flat))
            yield together(self.held("gradients", flat), self.held("optimizer", flat * scratch))
        if self.stage < 3 and self.copies > 1:  # gloo gathers the new weights through a buffer
            size = min(self._limit("allgather_bucket_size", _BUCKET), self.count)
            yield self.held("gather", blocks(size * self.itemsize))

    def gathered(self, trace: Trace) -> list[Amount]:
        """Return the weights that ZeRO 3 gathers at each moment of a trace, with their buffer.

        From the third step on, DeepSpeed knows the order of all modules: every module prefetches a
        bucket of the weights that come next, up to a limit, and a weight stays whole until its last
        use. Between forward and backward, weights beyond the limit leave for a while.
        """
        used = [moment.used for moment in trace.moments]
        if not self._gathers:
            return [NOTHING] * len(used)
        last = {number: now for now, numbers in enumerate(used) for number in numbers}
        total = sum(self.sizes[number] for number in last)
        each = blocks(*(self.sizes[number] * self.itemsize for number in last)) / max(1, total)
        bucket, persistent = self._prefetched, self._limit("param_persistence_threshold", 100_000)
        has_backward = trace.turn + 1 < len(used)
        held, seen, fetched, left = [], set[int](), 0, 0
        for now, numbers in enumerate(used):
            needed = sum(self.sizes[number] for number in numbers)
            ahead = min(fetched + bucket, left + self._most_gathered, total)
            new = sum(self.sizes[number] for number in numbers - seen)
            arriving = max(ahead - fetched, new if fetched < total else 0, 0)
            seen, fetched = seen | numbers, min(total, fetched + arriving)
            whole = fetched - left
            if has_backward:
                whole = min(whole, max(self._most_gathered, needed))
            held.append(each * whole + self.copies * blocks(arriving * self.itemsize))
            over = (self.sizes[number] for number in numbers if last[number] == now)
            left += sum(size for size in over if size > persistent)
        return held

    def fetched(self, trace: Trace) -> int:
        """Return the elements that ZeRO 3 gathers in a trace; 0 at the other stages.

        A backward gathers the weights beyond the limit again.
        """
        total = sum(self.sizes[n] for n in set().union(*(m.used for m in trace.moments)))
        again = max(0, total - self._most_gathered) * (trace.turn + 1 < len(trace.moments))
        return total + again if self._gathers else 0

    @property
    def _gathers(self) -> bool:
        return self.stage == 3 and (self.ranks > 1 or self.place("offload_param") == "host")

    @property
    def _prefetched(self) -> int:
        return self._limit("prefetch_bucket_size", 50_000_000)

    @property
    def _most_gathered(self) -> int:
        # Elements beside the active module: prefetched weights, and weights used soon again.
        soon = self._limit("max_reuse_distance") // 2
        return max(soon, self._limit("max_live_parameters") if self._prefetched else 0)

    def _limit(self, name: str, default: int = _BILLION) -> int:
        return int(self.zero.get(f"stage3_{name}", self.zero.get(name, default)))

    def _bucket(self, done: int) -> int:
        # Elements of the reduce bucket; on a CPU only the part that is written takes memory.
        limit = self._limit("reduce_bucket_size", _BUCKET)
        return min(limit, done) if self.is_cpu else limit

    @property
    def _shard(self) -> Amount:
        # The rank's part of one fp32 value for every weight that learns.
        if self.stage == 0:
            return blocks(*(numel * FP32 for numel in self.learned))
        return blocks(self.share(self.count) * FP32)

    @property
    def _sums_in_place(self) -> bool:
        # True if gradients are added to one fp32 buffer of the rank's shard: 16-bit models at
        # ZeRO 2, also with offload (`_build_compact_grad_partition_buffer` of DeepSpeed).
        return self.stage == 2 and self.itemsize < FP32
