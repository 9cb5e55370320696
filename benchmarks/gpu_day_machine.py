"""The machine of `gpu_day.py`: GPU, driver, clocks, versions and commit."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata
from typing import TYPE_CHECKING

from launching import ROOT
from machine import machine

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("torch", "triton", "deepspeed", "transformers")
# In the order in which nvidia-smi prints them.
ASKED = {
    "name": "GPU",
    "driver_version": "driver",
    "memory.total": "memory",
    "clocks.sm": "SM clock now",
    "clocks.mem": "memory clock now",
    "clocks.max.sm": "SM clock at most",
    "clocks.max.mem": "memory clock at most",
    "power.limit": "power limit",
    "temperature.gpu": "temperature (C)",
}
TIMEOUT_S = 20


def has_gpu() -> bool:
    """Return whether torch can use a GPU."""
    import torch  # takes seconds, and a rehearsal does not ask

    return torch.cuda.is_available()


def describe(*, rehearsal: bool) -> dict[str, str]:
    """Return the machine, its GPUs as nvidia-smi prints them, and what runs on the machine."""
    gpus = {"GPU": "none: rehearsal on a CPU, without clocks"} if rehearsal else _gpus()
    return {**gpus, "CPU": machine(), **_versions(), "commit": _commit()}


def _gpus() -> dict[str, str]:
    """Return the answers of nvidia-smi for the first GPU."""
    query = [f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    lines = _output(["nvidia-smi", *query]).splitlines()
    if not lines:
        return {"GPU": "nvidia-smi does not answer: name and clocks are unknown"}
    answers = [answer.strip() for answer in lines[0].split(",")]
    return {**dict(zip(ASKED.values(), answers, strict=False)), "GPUs": str(len(lines))}


def _versions() -> dict[str, str]:
    """Return the versions of the installed packages, without importing them."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    if not commit:
        return "unknown"
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit} with changes" if changed else commit


def _output(command: Sequence[str]) -> str:
    """Return what a program prints; empty if the program is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
