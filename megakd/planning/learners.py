"""What DeepSpeed 0.19.8 holds of a model that learns at ZeRO 0, 1 and 2.

Taken from its sources: which buffers there are, when they are made, and which of them are alive
together. AdamW keeps two moments of fp32 per weight, SGD none; bf16 and fp16 keep the weights in
fp32 too.
"""

from __future__ import annotations

from collections.abc import Sequence

from megakd.planning.engines import Setting, Whole
from megakd.planning.ledger import Holder, Place
from megakd.planning.moments import NOTHING, Amount, amount_of, block

FP32, FP64 = 4, 8
_FLAT_BUCKET = 500_000_000  # elements that ZeRO 0 sends at a time


def scratch_of_update(setting: Setting, weights: Amount, largest: int) -> Amount:
    """The denominator of AdamW; of SGD the gradient with the decay in it.

    Args:
        setting: torch goes through the tensors one by one on a CPU, where AdamW holds two copies
            of the one at hand; on a GPU all are taken at once, and one copy is held.
        weights: all that are updated together, in fp32.
        largest: elements of the largest tensor of them.
    """
    return block(largest * FP32).times(2 if setting.moments else 1) if setting.is_cpu else weights


class Replicated(Whole):
    """ZeRO 0 in fp32: torch's optimizer on every rank."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._first = True
        self._gradients = setting.holder("gradients")
        self._optimizer = setting.holder("optimizer")

    def initialize(self) -> None:
        """Nothing yet: the moments come with the first update."""

    def begin_backward(self, *, first: bool) -> None:
        """Takes whether it is the first of a step: gradients of earlier ones stay."""
        self._first = first

    def finish(self, numbers: Sequence[int]) -> None:
        """The gradients of these parameters are complete, and stay as they are."""
        if self._first:
            self.at.ledger.add(self._gradients, self.at.gradients(numbers))

    def end_backward(self, *, last: bool) -> None:
        """After a step's last one, gradients are sent side by side, a copy of all of them."""
        at = self.at
        if last:
            sent = min(at.inventory.numel, _FLAT_BUCKET + at.inventory.largest)
            sending = at.holder("gradients", "device", "sent")
            at.ledger.briefly(sending, block(sent * at.itemsize))

    def update(self) -> None:
        """The moments of every weight."""
        at = self.at
        at.ledger.put(self._optimizer, at.inventory.amount(FP32).times(at.moments))
        self._step()

    def _step(self) -> None:
        at = self.at
        scratch = scratch_of_update(at, at.inventory.amount(FP32), at.inventory.largest)
        at.ledger.briefly(at.holder("optimizer", "device", "scratch"), scratch)
        at.ledger.drop(self._gradients)


class Mastered(Replicated):
    """ZeRO 0 in bf16 or fp16: the weights in fp32 beside them, and their gradients in a step."""

    def initialize(self) -> None:
        """DeepSpeed takes a first step with gradients of zero."""
        at = self.at
        whole = at.inventory.amount(FP32)
        at.ledger.put(self._optimizer, whole)
        at.ledger.put(self._gradients, at.inventory.amount(at.itemsize).plus(whole))
        at.ledger.put(self._optimizer, whole.times(1 + at.moments))
        self._step()

    def update(self) -> None:
        """Gradients of both types are alive."""
        self.at.ledger.add(self._gradients, self.at.inventory.amount(FP32))
        self._step()


class Divided(Whole):
    """ZeRO 1 and 2: weights whole, in a flat buffer per group; all else in shards."""

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
        """Group by group the weights are copied side by side; then a shard of them in fp32."""
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
        """Weights and gradients in fp32, the weights as they are sent back, and one gradient."""
        at = self.at
        narrow = amount_of(at.share(group) * at.itemsize for group in at.groups())
        at.ledger.put(at.holder("optimizer", place), self._shard.plus(narrow))
        at.ledger.put(at.holder("gradients", place), self._shard.plus(largest))

    def begin_backward(self, *, first: bool) -> None:
        """ZeRO 2 sends gradients as they come, ZeRO 1 once per step."""
        self._first, self._done = first, 0
        self._filled = self._written = 0
        if self.at.stage == 2:
            self._hold_buckets()

    def _hold_buckets(self) -> None:
        """A bucket is there at once; on a CPU it takes memory as far as it was ever filled."""
        at = self.at
        whole = block(at.bucket("reduce_bucket_size") * at.itemsize)
        share = self._written * at.itemsize / whole.total if at.is_cpu else 1
        buckets = 2 if at.zero.get("overlap_comm") else 1
        at.ledger.put(self._bucket, whole.times(share * buckets))

    def _collect(self, numel: int) -> None:
        """A gradient goes into the bucket, which is sent before it would run over."""
        limit = self.at.bucket("reduce_bucket_size")
        if self._filled + numel > limit:
            self._send()
        self._filled += numel
        if self._filled <= limit:  # a gradient larger than the bucket is sent as it is
            self._written = max(self._written, self._filled)
            self._hold_buckets()

    def _send(self) -> None:
        """Slices that go to several ranks are laid side by side once more."""
        at = self.at
        if at.ranks > 1:
            at.ledger.briefly(self._bucket, block(self._filled * at.itemsize))
        self._filled = 0

    def finish(self, numbers: Sequence[int]) -> None:
        """ZeRO 1 keeps gradients whole; ZeRO 2 keeps a rank's own, in a buffer of their size."""
        at = self.at
        if at.stage == 1:
            if self._first:
                at.ledger.add(self._whole, at.gradients(numbers))
            return
        for number in numbers:
            self._collect(at.inventory.parameters[number].numel)
        if self._is_here:
            self._done += sum(at.inventory.parameters[number].numel for number in numbers)
            # On a GPU the buffer is there at once; on a CPU it takes memory where it is filled.
            filled = self._done if at.is_cpu else at.inventory.numel
            at.ledger.put(self._own, self._kept(filled).plus(self._earlier()))

    @property
    def _whole(self) -> Holder:
        return self.at.holder("gradients", "device", "whole")

    def _kept(self, numel: int) -> Amount:
        """Of `numel` gradients those that lie in the rank's shard, if only with a corner."""
        share = self._touched * min(1.0, numel / self.at.inventory.numel)
        return block(share * self.at.itemsize)

    def _earlier(self) -> Amount:
        """What the micro-batches before left, to which this one's is added at its end."""
        return NOTHING if self._first else self._kept(self.at.inventory.numel)

    def end_backward(self, *, last: bool) -> None:
        """ZeRO 1 sends what it has after the last; of what was sent a rank keeps its own."""
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
        """Group by group: its gradients once more, in fp32 and flat, then the optimizer."""
        at = self.at
        if self._is_here:
            self._update_here()
        elif self._place is not None:
            moments = at.holder("optimizer", self._place, "moments")
            at.ledger.put(moments, self._shard.times(at.moments))
        if at.is_cpu and at.ranks > 1:  # gloo gathers the new weights by way of a buffer
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
    """Elements of all parameters that reach into a shard, of the rank that has the most."""
    touched = [0] * setting.ranks
    for decays in (True, False):
        numels = [p.numel for p in setting.inventory.parameters if p.decays == decays]
        share, start = setting.share(sum(numels)), 0
        for numel in numels:
            for rank in range(start // share, (start + numel - 1) // share + 1):
                touched[rank] += numel
            start += numel
    return max(touched)
