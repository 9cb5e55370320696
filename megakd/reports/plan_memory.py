"""Memory of a rank: closed forms of DeepSpeed 0.19.8's engines, and the peak of their sum.

For N weights that learn, of P weights, with w bytes per weight in the forward, on R ranks:

stage   weights  optimizer    gradients in a backward        in an update
0       P w      4 N m        N w, and a bucket at the end   4 N if w < 4
1       P w      4 N m / R    N w, and buckets at the end    own gradients, 4 N / R
2       P w      4 N m / R    own gradients, and buckets     own gradients, 4 N / R
3       P w / R  4 N m / R    4 N / R, and buckets           4 N / R

m: the fp32 moments of a weight (AdamW 2, SGD 0), and 1 for a weight in fp32, which DeepSpeed keeps
for 16-bit models, at ZeRO 1 to 3, and with offload. At ZeRO 1 and 2 a rank's own gradients are
those of the weights that its shard overlaps, and 4 N / R in 16-bit models at ZeRO 2. Where two
buffers may overlap in time, a form has their sum.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from megakd.reports.plan_tracing import MAPPED_BYTES, Trace

Part = Literal["weights", "gradients", "optimizer", "activations", "gather", "checkpoint"]
PARTS: tuple[Part, ...] = get_args(Part)
Place = Literal["device", "host"]
PLACES: tuple[Place, ...] = get_args(Place)
_HOLES = {"gather": 1.1, "gradients": 1.4, "activations": 1.4}
"""Factors of the C library's heap, whose freed blocks leave holes that no later block fills."""
_HEADROOM = 1.08
"""Factor of the memory of CPU ranks: a plan that is too low is worse than one that is too high.

The same run takes 2 to 5 % more or less from one time to the next.
"""
FP32, FP64 = 4, 8
_BUCKET = 500_000_000  # elements, DeepSpeed's default
_BILLION = 1_000_000_000  # elements; DeepSpeed's default of several limits of ZeRO 3


class Share(NamedTuple):
    """A kind of memory: the role that owns it, its part, its place, and small blocks on a heap."""

    role: str
    part: Part
    place: Place = "device"
    on_heap: bool = False


Holding: TypeAlias = Counter[Share]
"""Bytes in use at one time; holdings are added with `+`."""


def blocks(role: str, part: Part, *sizes: float, place: Place = "device") -> Holding:
    """Return blocks of these bytes, of which a heap has the small ones."""
    large = sum(size for size in sizes if size >= MAPPED_BYTES)
    share = Share(role, part, place)
    small = round(sum(sizes) - large)
    return Counter({share: round(large), share._replace(on_heap=True): small})


class Peak(NamedTuple):
    """The highest memory in use: bytes, time, and shares."""

    total: int = 0
    when: str = ""
    shares: Mapping[Share, int] = Counter()


_total = operator.attrgetter("total")


class Ledger:
    """The peaks of a rank on its device and on its host, and the most bytes of each share.

    On a CPU rank both are the same, and the process keeps the memory of freed small blocks (see
    `engine.memory`). `process`: bytes of the host without models, which count in its peak.
    """

    def __init__(self, device: str, process: int) -> None:
        self.peak, self.host_peak, self.most = Peak(), Peak(), Counter[Share]()
        self._is_cpu, self._process = device == "cpu", process
        self._heap = Counter[float]()  # factor of holes -> most bytes

    def look(self, when: str, *holdings: Holding) -> None:
        """Record what a rank holds at one time, during the activity `when`."""
        held, small = sum(holdings, Counter[Share]()), Counter[float]()
        for share in [share for share in held if share.on_heap]:
            size = held.pop(share)
            small[_HOLES[share.part]] += size
            held[share._replace(on_heap=False)] += size
        self.most |= held  # the maximum of each
        if self._is_cpu:
            self._heap |= small
            heap = sum(factor * size for factor, size in self._heap.items())
            total = round(_HEADROOM * (held.total() - small.total() + heap)) + self._process
            self.peak = self.host_peak = max(self.peak, Peak(total, when, held), key=_total)
            return
        here, away = ({s: n for s, n in held.items() if s.place == place} for place in PLACES)
        self.peak = max(self.peak, Peak(sum(here.values()), when, here), key=_total)
        on_host = Peak(self._process + sum(away.values()), when, away)
        self.host_peak = max(self.host_peak, on_host, key=_total)


@dataclass(kw_only=True)
class Engine:
    """A model on a rank: whole weights, or at ZeRO 3 a shard.

    sizes, learned: elements of its weights, and of those that learn, in order.
    zero: the section `zero_optimization` of the DeepSpeed config.
    itemsize: bytes of a weight in the forward.
    stored_itemsize: mean bytes of a weight in memory, if it is quantized or has 8 bits there.
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
    stored_itemsize: float | None = None

    def __post_init__(self) -> None:
        self.stage = int(self.zero.get("stage", 0))
        self.numel, self.count = sum(self.sizes), sum(self.learned)
        self._stored = self.stored_itemsize or self.itemsize
        self.largest, self._gradient = max(self.sizes), max(self.learned, default=0)
        self.weights_at: Place = self._place("offload_param")
        self.optimizer_at: Place = self._place("offload_optimizer")
        self.shard = -(-self.numel // self.ranks)
        self.part = -(-self.count // self.ranks)  # of the weights that learn
        # Gradients are added to one fp32 buffer of the rank's shard: 16-bit models at ZeRO 2, also
        # with offload (`_build_compact_grad_partition_buffer` of DeepSpeed).
        self._sums_in_place = self.stage == 2 and self.itemsize < FP32
        # Several CPU ranks add a buffer of gloo to that of a collective.
        self._copies = 2 if self.is_cpu and self.ranks > 1 else 1
        self._gathers = self.stage == 3 and (self.ranks > 1 or self.weights_at == "host")
        self._prefetched = self._limit("prefetch_bucket_size", 50_000_000)
        # Elements of prefetched weights, and of weights used soon again.
        live = self._limit("max_live_parameters") if self._prefetched else 0
        self._most_gathered = max(self._limit("max_reuse_distance") // 2, live)

    def _place(self, offload: str) -> Place:
        return "host" if (self.zero.get(offload) or {}).get("device") == "cpu" else "device"

    def _limit(self, name: str, default: int = _BILLION) -> int:
        return int(self.zero.get(f"stage3_{name}", self.zero.get(name, default)))

    def _bucket(self, done: int) -> int:
        # Elements of the reduce bucket; on a CPU only the part that is written takes memory.
        if not self.is_cpu:
            return self._limit("reduce_bucket_size", _BUCKET)
        return min(max(size for _, size in self._sent), done)

    def blocks(self, part: Part, *sizes: float, place: Place = "device") -> Holding:
        return blocks(self.role, part, *sizes, place=place)

    def held(self, part: Part, size: float, place: Place = "device") -> Holding:
        """Return bytes that never count as freed blocks of a heap."""
        return Counter({Share(self.role, part, place): round(size)})

    def live(self, small: int, large: int) -> Holding:
        """Return activations of these bytes in small and in large blocks."""
        share = Share(self.role, "activations")
        return Counter({share: large, share._replace(on_heap=True): small})

    def like(
        self, part: Part, elements: float, tensors: Sequence[int], place: Place = "device"
    ) -> Holding:
        """Return elements of the model in blocks of the sizes of these tensors."""
        each = self.blocks(part, *(n * self._stored for n in tensors), place=place)
        return Counter({s: round(n * elements / max(1, sum(tensors))) for s, n in each.items()})

    def _weights(self) -> Holding:
        if self.stage < 3:
            return self.held("weights", self.numel * self._stored)
        return self.held("weights", self.shard * self._stored, self.weights_at)

    def loading(self) -> Holding:
        """Return the most memory in use while the model is loaded tensor by tensor."""
        if self.stage == 3:  # a rank reads its part of a tensor, and draws whole ones in fp32
            return self._weights() + self.held("weights", self.largest * FP32, "host")
        # A tensor that is read is copied to the tensors before it.
        most = max(map(operator.add, accumulate(self.sizes), self.sizes))
        on_gpu = Counter[Share]() if self.is_cpu else self._weights()
        return on_gpu + self.held("weights", most * self._stored, "host")

    def resting(self) -> Holding:
        """Return the memory in use between two steps, from the second step on."""
        if self.moments is None:
            return self._weights()
        place, width = self.optimizer_at, self.itemsize
        values = self.moments + (
            self.stage > 0 or width < FP32 or "host" in (place, self.weights_at)
        )
        part = FP32 * (self.part if self.stage else self.count)
        held = self._weights() + self.held("optimizer", part * values, place)
        if self.stage == 3:
            away = part * (2 if place == "host" else 1)
            held += self.blocks("gradients", away, place=place)
            held += self.blocks("gradients", self._bucket(self.count) * width)
        elif self.stage > 0 and place == "host":
            largest = self._gradient * width
            held += self.blocks("gradients", part, self.part * width, largest, place=place)
            held += self.blocks("gradients", largest)
        return held

    def averages(self, weights: int, values: int) -> Holding:
        """Return `values` that a strategy keeps beside the optimizer for some of the weights."""
        # At ZeRO 1 and 2 a shard may consist of these weights alone.
        most = self.part if self.stage in (1, 2) else -(-weights // self.ranks)
        return self.held("optimizer", values * min(weights, most) * FP32, self.optimizer_at)

    def backward(self, done: int, before: int = 0, *, adds: bool, last: bool = False) -> Holding:
        """Return the additional memory of gradients while they become complete for `done` elements.

        before: elements that are complete at the beginning. With `adds`, gradients are added to
        those of an earlier backward of the step; `last`: at the end of the step's last backward.
        """
        limit, buckets = self._limit("reduce_bucket_size", _BUCKET), list[int]()
        direct = self._gradient if self._gradient > limit else 0  # it is sent without the bucket
        if self.stage == 3:  # the copies of the bucket that order gradients by rank
            buckets = [self._bucket(self.count)] * self._copies + [direct]
        elif self.stage == 0:
            buckets = [min(self.count, _BUCKET + self._gradient)] * last
        elif self.stage == 2 or last:
            buckets = [self._bucket(done)] * (2 if self.zero.get("overlap_comm") else 1)
            sent = [size for at, size in self._sent if before < at <= (math.inf if last else done)]
            buckets.append(max([direct, *sent] if self.ranks > 1 else [direct]))  # it is copied
        held = self.gradients(self.count if adds and self.stage < 2 else done)
        if adds and self.stage == 2 and not self._sums_in_place:
            held += self.gradients(self.count)
        return held + self.blocks("gradients", *(n * self.itemsize for n in buckets))

    @cached_property
    def _sent(self) -> list[tuple[float, int]]:
        # Elements that are complete when a bucket is sent, since a gradient does not fit into it,
        # and the elements of the bucket; the last is sent at the end.
        limit, done, filled, sent = self._limit("reduce_bucket_size", _BUCKET), 0, 0, []
        for size in reversed(self.learned):
            done += size
            if filled + size > limit:
                sent.append((done, filled))
                filled = 0
            filled += size if size <= limit else 0
        return [*sent, (math.inf, filled)]

    def gradients(self, done: int) -> Holding:
        """Return the gradients of a rank that are complete for `done` elements, without buckets."""
        if self.stage == 3:
            return Counter()
        if self.stage < 2:
            return self.like("gradients", done, self.learned)
        most = max(size for size, _ in self._own)
        return self.blocks("gradients", most * (done / self.count if self.is_cpu else 1))

    @cached_property
    def _own(self) -> list[tuple[int, int]]:
        # Of each rank: bytes of the gradients of weights that its shard overlaps, also where it has
        # only a part of them, and elements of its largest part.
        if self.stage == 3:
            return [(0, -(-self._gradient // self.ranks))]
        if self._sums_in_place or self.optimizer_at == "host":
            return [(self.part * FP32 * self._sums_in_place, min(self._gradient, self.part))]
        width = FP32 if self.stage == 2 else self.itemsize  # ZeRO 2 adds up in fp32
        ends, ranks = list(zip(accumulate(self.learned), self.learned, strict=True)), []
        for start in range(0, self.count, self.part):
            stop = start + self.part
            over = [(n, min(end, stop) - max(end - n, start)) for end, n in ends]
            inside = [(n, part) for n, part in over if part > 0]
            ranks.append((width * sum(n for n, _ in inside), max(part for _, part in inside)))
        return ranks

    def updating(self) -> list[Holding]:
        """Return the additional memory of each part of an update: norm, fp32 gradients, gather.

        SGD also holds its decayed gradient; fused AdamW has no scratch memory.
        """
        scratch, parts = FP32 * (self.moments == 0), list[Holding]()
        if self.stage == 0:
            wide = self.blocks("gradients", *(n * FP32 for n in self.learned))
            # A CPU updates tensor by tensor, and a GPU all of them at once.
            decayed = scratch * (self._gradient if self.is_cpu else self.count)
            held = self.gradients(self.count) + self.held("optimizer", decayed)
            return [held + wide if self.itemsize < FP32 else held]
        if self.optimizer_at == "device":
            limit = int(self.zero.get("sub_group_size", _BILLION)) if self.stage == 3 else self.part
            flat = self.blocks("gradients", FP32 * min(limit, self.part))
            decayed = self.held("optimizer", scratch * min(limit, self.part))
            summed = Counter[Share]() if self._sums_in_place else flat
            norm = max(size + FP64 * part for size, part in self._own)
            overlapped = self.blocks("gradients", max(size for size, _ in self._own))
            parts = [self.blocks("gradients", norm), overlapped + summed, flat + decayed]
        if self.stage < 3 and self._copies > 1:  # gloo gathers the new weights through a buffer
            size = min(self._limit("allgather_bucket_size", _BUCKET), self.count)
            parts.append(self.blocks("gather", size * self.itemsize))
        return parts

    def gathered(self, trace: Trace) -> tuple[Holding, Holding]:
        """Return what ZeRO 3 gathers in a trace at most, and the buffers of a gather.

        From the third step on, DeepSpeed knows the order of all modules: every module prefetches a
        bucket of the weights that come next, up to a limit, and before a backward a weight stays
        whole until it is used again, up to a limit.
        """
        read, largest = sum(trace.read), max(trace.read, default=0)
        stays = trace.has_backward or self._prefetched > 0
        whole = min(read, max(self._most_gathered, largest)) if stays else largest
        buffer = min(read, max(self._prefetched, largest)) * self._stored
        if not self._gathers:
            return Counter(), Counter()
        return (
            self.like("gather", whole, trace.read),
            self.blocks("gather", *[buffer] * self._copies),
        )

    def is_gathered_early(self, trace: Trace) -> bool:
        """Return whether all weights are whole before most activations exist."""
        return self._prefetched > 0 and sum(trace.read) <= self._most_gathered

    def fetched(self, trace: Trace) -> int:
        """Return the elements that ZeRO 3 gathers in a trace; 0 at the other stages.

        A backward gathers the weights beyond the limit again.
        """
        read = sum(trace.read)
        again = max(0, read - self._most_gathered) * trace.has_backward
        return (read + again) * self._gathers
