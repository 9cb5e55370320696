"""The gradient of one step, without what DeepSpeed's ZeRO optimizers keep of earlier steps.

DeepSpeed overwrites a kept gradient when a backward reaches its weight. A weight that is not
reached, because a loss was left out or a head was not used, would get a gradient of an earlier step
at ZeRO 3 and with an offloaded optimizer. Only the kept gradients of such weights are cleared.
Reaching every weight with a loss of 0 would gather every weight at ZeRO 3.
"""

from __future__ import annotations

from itertools import chain
from typing import Any


def copies_last_backward_alone(engine: Any) -> bool:
    """Return whether the optimizer is offloaded and would lose gradients of earlier backwards.

    At ZeRO 2 and 3, DeepSpeed copies to an offloaded optimizer only the gradients of weights that
    the last backward of a step reaches.
    """
    return engine.zero_cpu_offload() and engine.zero_optimization_stage() > 1


def after_first_backward(optimizer: Any) -> None:
    """Clear the kept sums of weights that the first backward of a step has not reached."""
    if hasattr(optimizer, "grad_partitions_flat_buffer"):  # ZeRO 3
        offset = 0
        for parameter in chain.from_iterable(optimizer.fp16_groups):
            size = parameter.partition_numel()
            if parameter.ds_id not in optimizer._offload_boundary_param_ids:  # noqa: SLF001
                optimizer.grad_partitions_flat_buffer.narrow(0, offset, size).zero_()
            offset += size
    for number, kept in getattr(optimizer, "accumulated_grads_in_cpu", {}).items():
        if number not in optimizer._offload_accumulated_param_ids:  # noqa: SLF001
            kept.zero_()


def after_last_backward(engine: Any, *, copy_all: bool) -> None:
    """Complete the gradient that an offloaded optimizer reads.

    Args:
        engine: the training engine.
        copy_all: whether no backward of the step has copied its gradients to the optimizer.
    """
    optimizer = engine.optimizer
    if copy_all:
        engine.set_gradient_accumulation_boundary(is_boundary=True)
        optimizer.finalize_gradient_accumulation_boundary()
    if not engine.zero_cpu_offload():
        return
    flats = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    flats = optimizer.single_partition_of_fp32_groups if flats is None else flats
    for number, (group, *_, start, size) in optimizer.grad_position.items():
        if number not in optimizer.norm_for_param_grads:
            flats[group].grad.narrow(0, int(start), int(size)).zero_()


def after_update(optimizer: Any) -> None:
    """Let go of gradients that overflowed, which DeepSpeed would otherwise add to forever."""
    kept = getattr(optimizer, "averaged_gradients", {})
    kept.update(dict.fromkeys(kept))
