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
RETURNED_BYTES = 128 << 10
KEPT_BYTES = 32 << 20  # the largest value that glibc accepts
TRIMMED_BYTES = 1 << 30
PROCESS, CGROUPS = Path("/proc/self"), Path("/sys/fs/cgroup")
MEMORY_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Files of a limit and of what counts against it, in versions 2 and 1 of control groups."""
_EARLIER: dict[str, int] = {}
"""Type of device -> highest peak before the last reset."""
_COUNTED: dict[str, int] = {}
"""Type of device -> peak since the last reset, up to memory that was left out."""


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Return freed tensors to the system in the body, and keep them in the process afterwards."""
    set_thresholds(mapped=RETURNED_BYTES, trimmed=RETURNED_BYTES)
    try:
        yield
    finally:
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Keep freed tensors in the process, because the next step allocates the same amount.

    Return whether the allocator accepted the setting; only glibc's allocator has it.
    """
    return set_thresholds(mapped=KEPT_BYTES, trimmed=TRIMMED_BYTES)


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
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def set_thresholds(*, mapped: int, trimmed: int) -> bool:
    """Set when glibc returns memory to the system; return whether it accepted both settings.

    Freed blocks of more than `mapped` bytes are returned. A heap is trimmed when it has `trimmed`
    unused bytes at its end.
    """
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, mapped) and mallopt(M_TRIM_THRESHOLD, trimmed))


def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None


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
    return min([psutil.virtual_memory().available, *_left_by_limits()])


def _left_by_limits() -> Iterator[int]:
    """Yield the memory that each limit leaves, such as that of a container or of a Slurm job."""
    try:
        lines = (PROCESS / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        root = CGROUPS / kinds  # version 2 has one tree, version 1 a tree of each kind
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield from _left_by(folder)


def _left_by(group: Path) -> Iterator[int]:
    for limit, used in MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or a limit of "max"
            left = int((group / limit).read_text()) - int((group / used).read_text())
            counts = (group / "memory.stat").read_text()
            cached = re.search(r"^inactive_file (\d+)$", counts, re.MULTILINE)
            yield left + (int(cached[1]) if cached else 0)


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
