"""Memory of DeepSpeed 0.19.8 for a trained model at ZeRO 0, 1 and 2.

The buffers, the times of their allocation, and their overlap are taken from DeepSpeed's sources.
AdamW keeps two fp32 moments per weight, SGD keeps none; bf16 and fp16 models also keep the
weights in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

from megakd.planning.engines import Setting, Unsharded
from megakd.planning.ledger import Holder, Place
from megakd.planning.moments import NOTHING, Amount, amount_of, block

FP32, FP64 = 4, 8
_FLAT_BUCKET = 500_000_000  # elements per message of ZeRO 0


def scratch_of_update(setting: Setting, weights: Amount, largest: int) -> Amount:
    """Return the scratch memory of an update.

    The scratch memory holds the denominator of AdamW, or for SGD the gradient with weight decay.

    Args:
        setting: on a CPU torch updates the tensors one by one, and AdamW holds two copies of the
            current tensor; on a GPU all tensors are updated together, with one copy.
        weights: memory of all tensors that are updated together, in fp32.
        largest: elements of the largest of these tensors.
    """
    return block(largest * FP32).times(2 if setting.moments else 1) if setting.is_cpu else weights


class Replicated(Unsharded):
    """Engine of ZeRO 0 in fp32: torch's optimizer on every rank."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._first = True
        self._gradients = setting.holder("gradients")
        self._optimizer = setting.holder("optimizer")

    def initialize(self) -> None:
        """Do nothing: the first update allocates the moments."""

    def begin_backward(self, *, first: bool) -> None:
        """Store whether this is the first backward of a step; gradients stay until the update."""
        self._first = first

    def finish(self, numbers: Sequence[int]) -> None:
        """Allocate the complete gradients of these parameters; they stay unchanged."""
        if self._first:
            self.at.ledger.add(self._gradients, self.at.gradients(numbers))

    def end_backward(self, *, last: bool) -> None:
        """Allocate a flat copy of all gradients for sending, after the last backward of a step."""
        at = self.at
        if last:
            sent = min(at.inventory.numel, _FLAT_BUCKET + at.inventory.largest)
            sending = at.holder("gradients", "device", "sent")
            at.ledger.briefly(sending, block(sent * at.itemsize))

    def update(self) -> None:
        """Allocate the moments of every weight, then update."""
        at = self.at
        at.ledger.put(self._optimizer, at.inventory.amount(FP32).times(at.moments))
        self._step()

    def _step(self) -> None:
        at = self.at
        scratch = scratch_of_update(at, at.inventory.amount(FP32), at.inventory.largest)
        at.ledger.briefly(at.holder("optimizer", "device", "scratch"), scratch)
        at.ledger.drop(self._gradients)


class Mastered(Replicated):
    """Engine of ZeRO 0 in bf16 or fp16: also fp32 weights, and fp32 gradients during a step."""

    def initialize(self) -> None:
        """Allocate fp32 weights; DeepSpeed runs a first step with zero gradients."""
        at = self.at
        whole = at.inventory.amount(FP32)
        at.ledger.put(self._optimizer, whole)
        at.ledger.put(self._gradients, at.inventory.amount(at.itemsize).plus(whole))
        at.ledger.put(self._optimizer, whole.times(1 + at.moments))
        self._step()

    def update(self) -> None:
        """Update while gradients of both dtypes exist."""
        self.at.ledger.add(self._gradients, self.at.inventory.amount(FP32))
        self._step()


class Divided(Unsharded):
    """Engine of ZeRO 1 and 2: whole weights in a flat buffer per group; the rest in shards."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._place: Place | None = setting.place("offload_optimizer")
        self._first, self._done = True, 0
        self._filled = self._written = 0
        self._bucket = setting.holder("gradients", "device", "bucket")
        self._own = setting.holder("gradients")
        self._shard = amount_of(setting.share(group) * FP32 for group in setting.groups())
        self._touched = _most_touched(setting)

    @property
    def _is_here(self) -> bool:
        return self._place == "device"

    def initialize(self) -> None:
        """Copy the weights to a flat buffer group by group, then allocate their fp32 shard."""
        at = self.at
        flat = amount_of(group * at.itemsize for group in at.groups())
        at.ledger.briefly(at.holder("weights"), block(max(at.groups()) * at.itemsize))
        at.ledger.put(at.holder("weights"), flat)
        if self._is_here:
            at.ledger.put(at.holder("optimizer"), self._shard)
            at.ledger.briefly(self._own, self._shard)
            return
        largest = block(at.inventory.largest * at.itemsize)
        at.ledger.put(at.holder("gradients", "device", "largest"), largest)
        if self._place is not None:
            self._initialize_outside(self._place, largest)

    def _initialize_outside(self, place: Place, largest: Amount) -> None:
        """Allocate fp32 weights and gradients, narrow weights to send back, and one gradient."""
        at = self.at
        narrow = amount_of(at.share(group) * at.itemsize for group in at.groups())
        at.ledger.put(at.holder("optimizer", place), self._shard.plus(narrow))
        at.ledger.put(at.holder("gradients", place), self._shard.plus(largest))

    def begin_backward(self, *, first: bool) -> None:
        """Begin a backward: ZeRO 2 sends gradients immediately, ZeRO 1 once per step."""
        self._first, self._done = first, 0
        self._filled = self._written = 0
        if self.at.stage == 2:
            self._hold_buckets()

    def _hold_buckets(self) -> None:
        """Allocate the buckets; on a CPU a bucket takes memory only where it was ever filled."""
        at = self.at
        whole = block(at.bucket("reduce_bucket_size") * at.itemsize)
        share = self._written * at.itemsize / whole.total if at.is_cpu else 1
        buckets = 2 if at.zero.get("overlap_comm") else 1
        at.ledger.put(self._bucket, whole.times(share * buckets))

    def _collect(self, numel: int) -> None:
        """Add a gradient to the bucket, which is sent before it would overflow."""
        limit = self.at.bucket("reduce_bucket_size")
        if self._filled + numel > limit:
            self._send()
        self._filled += numel
        if self._filled <= limit:  # a gradient larger than the bucket is sent directly
            self._written = max(self._written, self._filled)
            self._hold_buckets()

    def _send(self) -> None:
        """Send the bucket; slices for several ranks are first copied to one buffer."""
        at = self.at
        if at.ranks > 1:
            at.ledger.briefly(self._bucket, block(self._filled * at.itemsize))
        self._filled = 0

    def finish(self, numbers: Sequence[int]) -> None:
        """Keep gradients: ZeRO 1 keeps whole gradients, ZeRO 2 keeps the rank's own in a buffer."""
        at = self.at
        if at.stage == 1:
            if self._first:
                at.ledger.add(self._whole, at.gradients(numbers))
            return
        for number in numbers:
            self._collect(at.inventory.parameters[number].numel)
        if self._is_here:
            self._done += sum(at.inventory.parameters[number].numel for number in numbers)
            # A GPU allocates the buffer at once; on a CPU it takes memory where it is filled.
            filled = self._done if at.is_cpu else at.inventory.numel
            at.ledger.put(self._own, self._kept(filled).plus(self._earlier()))

    @property
    def _whole(self) -> Holder:
        return self.at.holder("gradients", "device", "whole")

    def _kept(self, numel: int) -> Amount:
        """Return the memory of gradients, among `numel` elements, that overlap the rank's shard."""
        share = self._touched * min(1.0, numel / self.at.inventory.numel)
        return block(share * self.at.itemsize)

    def _earlier(self) -> Amount:
        """Return the memory of gradients from earlier micro-batches, which accumulate."""
        return NOTHING if self._first else self._kept(self.at.inventory.numel)

    def end_backward(self, *, last: bool) -> None:
        """Send the remaining gradients (ZeRO 1: after the last backward); keep the rank's own."""
        at, ledger = self.at, self.at.ledger
        if at.stage == 1 and last:
            for parameter in reversed(at.inventory.parameters):
                self._collect(parameter.numel)
            ledger.drop(self._whole)
        self._send()
        if self._is_here and (at.stage == 2 or last):
            ledger.put(self._own, self._kept(at.inventory.numel))
        ledger.drop(self._bucket)

    def update(self) -> None:
        """Update each group: copy its gradients to a flat fp32 buffer, run the optimizer."""
        at = self.at
        if self._is_here:
            self._update_here()
        elif self._place is not None:
            moments = at.holder("optimizer", self._place, "moments")
            at.ledger.put(moments, self._shard.times(at.moments))
        if at.is_cpu and at.ranks > 1:  # gloo gathers the new weights through a buffer
            bucket = min(at.bucket("allgather_bucket_size"), at.inventory.numel)
            at.ledger.briefly(at.holder("gather"), block(bucket * at.itemsize))

    def _update_here(self) -> None:
        at, flat = self.at, self.at.holder("gradients", "device", "flat")
        at.ledger.briefly(flat, block(at.inventory.largest * FP64))  # for their norm
        largest = max(at.share(group) for group in at.groups())
        at.ledger.put(flat, block(largest * FP32))
        at.ledger.drop(self._own)
        at.ledger.put(at.holder("optimizer"), self._shard.times(1 + at.moments))
        scratch = scratch_of_update(at, block(largest * FP32), largest)
        at.ledger.briefly(at.holder("optimizer", "device", "scratch"), scratch)
        at.ledger.drop(flat)


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
