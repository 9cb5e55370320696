"""Memory of DeepSpeed 0.19.8 for a trained model at ZeRO 3, from the same sources."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.planning.engines import Setting, ShardedWeights
from megakd.planning.learners import FP32, FP64, Divided, Mastered, Replicated, scratch_of_update
from megakd.planning.ledger import Place
from megakd.planning.moments import NOTHING, Amount, amount_of, block

_SUB_GROUP = 1_000_000_000  # elements per update


class Sharded(ShardedWeights):
    """ZeRO 3: everything is sharded; weights are gathered while the model runs."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._own = sum(setting.share(p.numel) for p in setting.inventory.parameters)
        self._optimizer_place: Place | None = setting.place("offload_optimizer")
        self._bucket = setting.holder("gradients", "device", "bucket")
        self._sub_groups = _sub_groups(setting)
        self._in_fp32 = amount_of(size * FP32 for size in self._sub_groups)

    def initialize(self) -> None:
        """Allocate a weight buffer, fp32 weights unless they already are, and a gradient buffer."""
        at, place = self.at, self._optimizer_place
        weights = at.place("offload_param")
        if weights is not None:
            at.ledger.put(at.holder("weights", weights), block(self._own * at.itemsize))
        if not at.is_cpu:
            at.ledger.put(self._bucket, self._bucket_size().times(2))
        if place is None:
            return
        is_master = at.itemsize == FP32 and place == weights == "device"
        at.ledger.put(at.holder("optimizer", place), NOTHING if is_master else self._in_fp32)
        gradients = at.holder("gradients", place)
        at.ledger.briefly(gradients, block(max(self._sub_groups) * FP32))
        narrow = block(self._own * at.itemsize)
        at.ledger.put(gradients, narrow if place == "device" else narrow.plus(self._in_fp32))

    def _bucket_size(self) -> Amount:
        return block(self.at.bucket("reduce_bucket_size") * self.at.itemsize)

    def begin_backward(self, *, first: bool) -> None:
        """Allocate the copies of the bucket that order gradients by rank."""
        del first
        copies = 3 if self.at.is_cpu and self.at.ranks > 1 else 2  # gloo adds a copy
        self.at.ledger.put(self._bucket, self._bucket_size().times(copies))

    def finish(self, numbers: Sequence[int]) -> None:
        """Send gradients that are larger than the bucket directly."""
        at = self.at
        for number in numbers:
            numel = at.inventory.parameters[number].numel
            if numel > at.bucket("reduce_bucket_size"):
                at.ledger.briefly(self._bucket, block(numel * at.itemsize))

    def end_backward(self, *, last: bool) -> None:
        """Free the copies of the bucket; the bucket stays."""
        del last
        self.at.ledger.put(self._bucket, self._bucket_size())

    def update(self) -> None:
        """Update each sub-group: copy its gradients to a flat fp32 buffer, run the optimizer."""
        at, place = self.at, self._optimizer_place
        if place is None:
            return
        if place == "device":
            largest = block(max(self._sub_groups) * FP32)
            norm = block(at.share(at.inventory.largest) * FP64)
            at.ledger.briefly(at.holder("gradients", "device", "flat"), norm)
            at.ledger.put(at.holder("optimizer", place, "moments"), self._in_fp32.times(at.moments))
            scratch = scratch_of_update(at, largest, max(self._sub_groups))
            at.ledger.briefly(at.holder("gradients", "device", "flat"), largest.plus(scratch))
        else:
            at.ledger.put(at.holder("optimizer", place, "moments"), self._in_fp32.times(at.moments))


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


Learner = Replicated | Mastered | Divided | Sharded


def learner_of(setting: Setting) -> Learner:
    """Return the engine of a trained model at its ZeRO stage."""
    if setting.stage == 0:
        return Replicated(setting) if setting.itemsize == FP32 else Mastered(setting)
    return Sharded(setting) if setting.stage == 3 else Divided(setting)
