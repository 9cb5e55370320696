"""The end of an engine, after which its memory can be freed."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator


def destroy(engine: Any) -> None:
    """Free an engine's memory, and remove its hooks and what DeepSpeed still refers to at ZeRO 3.

    DeepSpeed keeps every module of a ZeRO-3 engine in a list of running forwards and in a cache of
    the process, so that the weights would stay in memory until the process ends.
    """
    module = engine.module
    engine.destroy()
    running = parameter_offload.FWD_MODULE_STACK
    running[:] = [other for other in running if other is not module]
    # The cache is shared by all engines; another engine fills it again.
    for function in _cached_functions():
        function.cache_clear()


def _cached_functions() -> list[Any]:
    found: list[Any] = []
    for function in vars(PartitionedParameterCoordinator).values():
        # DeepSpeed wraps the cached function without a reference of its own.
        inner = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        found += [f for f in (function, *inner) if hasattr(f, "cache_clear")]
    return found
