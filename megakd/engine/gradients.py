"""The gradient of one step, without what DeepSpeed's ZeRO optimizers keep of earlier steps.

DeepSpeed overwrites a kept gradient when a backward reaches its weight. A weight that is not
reached, because a loss was left out or a head was not used, would get a gradient of an earlier step
at ZeRO 3 and with an offloaded optimizer. Only the kept gradients of such weights are cleared: to
reach every weight, with a loss of 0, would gather every weight at ZeRO 3.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor


class StepGradients:
    """The backwards of a step: `begin` and `backward` for each, then `forget` after the update."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._is_first = engine, True

    @property
    def scale(self) -> float:
        """The factor of the gradients until the update: that of the loss under fp16, else 1."""
        engine = self._engine
        return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0

    def begin(self, *, is_last: bool) -> None:
        """Prepare a forward and its backward, during which ZeRO 2 reduces gradients."""
        self._engine.set_gradient_accumulation_boundary(is_last and not self._copies_once)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of a loss; the last backward completes those of the step."""
        engine = self._engine
        # Without ZeRO, DeepSpeed divides by the scale and does not multiply.
        scaled = loss if engine.zero_optimization() else loss * self.scale
        engine.backward(scaled, scale_wrt_gas=False)
        if is_last and self._copies_once:
            engine.set_gradient_accumulation_boundary(is_boundary=True)
            engine.optimizer.finalize_gradient_accumulation_boundary()
        if self._is_first:
            _clear_missed_sums(engine.optimizer)
        if is_last and engine.zero_cpu_offload():
            _clear_missed_copies(engine.optimizer)
        self._is_first = is_last

    def forget(self) -> None:
        """Let go of gradients that overflowed, to which DeepSpeed would add for ever."""
        kept = getattr(self._engine.optimizer, "averaged_gradients", {})
        kept.update(dict.fromkeys(kept))

    @property
    def _copies_once(self) -> bool:
        """True if all gradients are copied to an offloaded optimizer after several backwards.

        At ZeRO 2 and 3, the last backward would copy only gradients of weights that it reaches.
        """
        offloads = self._engine.zero_cpu_offload() and self._engine.zero_optimization_stage() > 1
        return offloads and not self._is_first


def _clear_missed_sums(optimizer: Any) -> None:
    is_zero_3, offset = hasattr(optimizer, "grad_partitions_flat_buffer"), 0
    for weight in chain(*optimizer.fp16_groups) if is_zero_3 else ():
        size = weight.partition_numel()
        if weight.ds_id not in optimizer._offload_boundary_param_ids:  # noqa: SLF001
            optimizer.grad_partitions_flat_buffer.narrow(0, offset, size).zero_()
        offset += size
    for number, kept in getattr(optimizer, "accumulated_grads_in_cpu", {}).items():
        if number not in optimizer._offload_accumulated_param_ids:  # noqa: SLF001
            kept.zero_()


def _clear_missed_copies(optimizer: Any) -> None:
    flats = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    flats = optimizer.single_partition_of_fp32_groups if flats is None else flats
    for number, (group, *_, start, size) in optimizer.grad_position.items():
        if number not in optimizer.norm_for_param_grads:
            flats[group].grad.narrow(0, int(start), int(size)).zero_()
