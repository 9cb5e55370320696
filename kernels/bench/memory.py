"""Peak memory of one run beyond what its inputs take.

On CUDA the allocator counts it. On a CPU a process of its own runs one implementation of one
case and reads its resident memory: `python -m bench.memory CASE IMPLEMENTATION THREADS`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.cases import Case, cases_for
from bench.catalogue import find
from bench.peers import load
from bench.problem import Problem, drop_gradients, make_problem, run

CUDA_ALLOCATOR = "allocator"
HIGH_WATER_MARK = "VmHWM"
LARGEST_EVER = "ru_maxrss"
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # Linux: sets the process's peak resident memory to what is resident now
_WARM_ROWS = 8


class Peak(NamedTuple):
    """Bytes beyond what was there before, and how they were counted."""

    bytes_: int
    method: str


def peak_on_cuda(function: Callable[[], object], device: torch.device) -> Peak:
    """Return the peak of the allocator while the function runs."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return Peak(torch.cuda.max_memory_allocated(device) - before, CUDA_ALLOCATOR)


def peak_in_process(function: Callable[[], object]) -> Peak:
    """Return the rise of the process's resident memory while the function runs.

    Where the system cannot reset the peak (other than Linux), it is the rise of the largest
    resident memory ever, which is too small once more was used before.
    """
    gc.collect()
    _return_freed_memory()
    if _reset_peak():
        before = _status_bytes("VmRSS")
        function()
        return Peak(_status_bytes("VmHWM") - before, HIGH_WATER_MARK)
    before = _largest_ever()
    function()
    return Peak(_largest_ever() - before, LARGEST_EVER)


def peak_in_own_process(case: Case, implementation: str) -> Peak:
    """Measure in a fresh process; RuntimeError with its last words if it fails."""
    command = [sys.executable, "-m", "bench.memory", case.name, implementation]
    finished = subprocess.run(
        [*command, str(torch.get_num_threads())],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if finished.returncode != 0:
        words = finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"]
        raise RuntimeError(f"the process that measures memory failed: {words[-1]}")
    measured = json.loads(finished.stdout.splitlines()[-1])
    return Peak(measured["bytes"], measured["method"])


def _measure(case: Case, implementation: str) -> Peak:
    """The warm-up run loads libraries and compiles, which takes all rows."""
    problem = make_problem(case, torch.device("cpu"))
    loss = load(implementation, case)
    _warm(problem if find(implementation).compiles else problem.cut(_WARM_ROWS), loss)
    return peak_in_process(lambda: run(loss, problem))


def _warm(problem: Problem, loss: Callable[[Problem], torch.Tensor]) -> None:
    run(loss, problem)
    drop_gradients(problem)


def _reset_peak() -> bool:
    """True if the peak could be reset."""
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    line = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if line is None:
        raise RuntimeError(f"{_STATUS} has no {field}")
    return int(line[1]) * 1024


def _largest_ever() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _return_freed_memory() -> None:
    """Freed memory that glibc keeps would hide the memory of the function."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _main(name: str, implementation: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    case = next(each for each in cases_for("cpu") if each.name == name)
    peak = _measure(case, implementation)
    print(json.dumps({"bytes": peak.bytes_, "method": peak.method}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
