"""The machine of the numbers, and its speed: matrix products and copies."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.timing import Effort, Times, sample_ms, summarise

_GEMM_WIDTH = {"cuda": 8192, "cpu": 2048}
_COPIED_BYTES = {"cuda": 8_000_000_000, "cpu": 256_000_000}
_COMMAND_TIMEOUT_S = 10


class Machine(NamedTuple):
    """Names of the device and of what runs on it; commit is "" outside a git checkout."""

    device: str
    threads: int
    torch: str
    triton: str
    commit: str


class Ceilings(NamedTuple):
    """Best rates of the device: products in FLOP/s, copies in bytes read and written per s."""

    matmul: float
    copy: float
    matmul_times: Times
    copy_times: Times


def describe(device: torch.device) -> Machine:
    """This machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return Machine(name, torch.get_num_threads(), torch.__version__, _triton(), _commit())


def measure_ceilings(device: torch.device, effort: Effort) -> Ceilings:
    """Products of random square matrices and a large copy, at their medians.

    bf16 at 8192 on CUDA, fp32 at 2048 on a CPU; zeros would multiply faster than any data.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    width = _GEMM_WIDTH[device.type]
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    matmul = _times(lambda: torch.mm(left, right, out=product), device, effort)
    source = torch.randn(_COPIED_BYTES[device.type] // 4, device=device)
    copy = torch.empty_like(source)
    copied = _times(lambda: copy.copy_(source), device, effort)
    return Ceilings(
        matmul=2 * width**3 / (matmul.median / 1e3),
        copy=2 * source.nbytes / (copied.median / 1e3),
        matmul_times=matmul,
        copy_times=copied,
    )


def clock_mhz(device: torch.device) -> float | None:
    """The clock of the SMs now, as nvidia-smi reads it; None on a CPU or without the program."""
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    query = ["--query-gpu=clocks.sm", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    shown = _output([program, *query])
    return float(shown) if shown.replace(".", "", 1).isdigit() else None


def _times(function: Callable[[], object], device: torch.device, effort: Effort) -> Times:
    function()
    return summarise([sample_ms(function, device, effort) for _ in range(2)])


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{next(names, platform.processor() or platform.machine())}, {cores} cores"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return ""
    here = Path(__file__).parents[1]
    commit = _output([git, "-C", str(here), "rev-parse", "--short", "HEAD"])
    changed = _output([git, "-C", str(here), "status", "--porcelain", "--", "."])
    return f"{commit}+changes" if commit and changed else commit


def _output(command: list[str]) -> str:
    """Return the output of a program, or "" if it fails."""
    try:
        shown = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_COMMAND_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return shown.stdout.strip() if shown.returncode == 0 else ""
