"""Memory of a rank: its peak, settings of glibc's allocator, and clean-up after a finished model.

When a sharded model is built, each tensor is created whole and then freed. By default, glibc's
heap would keep most of this memory, nearly a whole model per rank, so that it must be returned to
the system. During training the opposite holds: every operator's output is freed and allocated
again. Memory that was returned to the system comes back page by page, which costs 20 % of a CPU
step.
"""

from __future__ import annotations

import ctypes
import gc
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PROCESS = Path("/proc/self")
_EARLIER: dict[str, int] = {}
"""Type of device -> highest peak before the last reset."""
_COUNTED: dict[str, int] = {}
"""Type of device -> peak since the last reset, up to memory that was left out."""


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Return freed tensors to the system in the body, and keep them in the process afterwards."""
    _set_thresholds(mapped=128 << 10, trimmed=128 << 10)
    try:
        yield
    finally:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Keep freed tensors in the process, because the next step allocates the same amount."""
    _set_thresholds(mapped=32 << 20, trimmed=1 << 30)  # the first is the largest that glibc takes


def _set_thresholds(*, mapped: int, trimmed: int) -> None:
    """Return freed blocks above `mapped` bytes, and an end of the heap above `trimmed` bytes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, mapped)
        mallopt(M_TRIM_THRESHOLD, trimmed)


@contextmanager
def earlier_objects_left_alone() -> Iterator[None]:
    """Exclude existing objects from garbage collection; modules alone take most of its time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def forget_models() -> None:
    """Free models that are no longer used, and return their memory to the system.

    An engine and its hooks form a reference cycle, which Python frees only at the next garbage
    collection. Without this call, the next model would be loaded while the old model still takes
    memory.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU's model, or the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory since `reset_peak_memory`, or of the process without a reset.

    The memory is the GPU's, or the host's if the device is a CPU. A system that cannot reset the
    peak of the host gives the peak of the process.
    """
    now = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_of_host()
    return max(now, _COUNTED.get(device.type, 0))


def _peak_of_host() -> int:
    try:
        status = (PROCESS / "status").read_text(encoding="utf-8")
    except OSError:  # not Linux
        status = ""
    peak = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    if peak is not None:
        return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def peak_memory_of_process(device: torch.device) -> int:
    """Return the peak memory since the process began, see `peak_memory_bytes`."""
    return max(_EARLIER.get(device.type, 0), peak_memory_bytes(device))


def free_memory_bytes(device: torch.device) -> int:
    """Return the memory that this rank could still use on a device."""
    if device.type == "cuda":
        # Memory that torch has cached is not free for the driver, and free for torch.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


@contextmanager
def left_out_of_peak(device: torch.device) -> Iterator[None]:
    """Leave memory that only the body uses out of the peak since the last reset."""
    before = peak_memory_bytes(device)
    try:
        yield
    finally:
        reset_peak_memory(device)
        _COUNTED[device.type] = before


def reset_peak_memory(device: torch.device) -> None:
    """Begin the measurement of another peak, from the memory in use at present."""
    _EARLIER[device.type] = peak_memory_of_process(device)
    _COUNTED.pop(device.type, None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # only Linux has the file, and some containers refuse the write
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")


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
    for function in vars(PartitionedParameterCoordinator).values():
        # DeepSpeed wraps the cached function without a reference of its own.
        inner = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        for cached in (f for f in (function, *inner) if hasattr(f, "cache_clear")):
            cached.cache_clear()
