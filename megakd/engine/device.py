"""The device of a rank: name and peak memory."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

PROCESS = Path("/proc/self")
_EARLIER: dict[str, int] = {}
"""Type of device -> highest peak before the last reset."""
_COUNTED: dict[str, int] = {}
"""Type of device -> peak since the last reset, up to memory that was left out."""


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
    """Return the peak that Linux can reset, or else the peak of the whole process."""
    try:
        status = (PROCESS / "status").read_text(encoding="utf-8")
    except OSError:  # not Linux
        status = ""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    if found is not None:
        return int(found[1]) * 1024
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
    try:
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")
    except OSError:  # only Linux has the file, and some containers refuse the write
        return
