"""Part of `gpu_day.py`: steps of a Llama of a billion weights or a SmolLM2, timed and profiled.

Teacher and student have random weights in bf16 and read packed rows. Steps
without a profiler give the speed and the memory; three steps under torch's profiler give the
kernels of the attention, the calls that make the host wait, and the most expensive kernels. One
more step finds the lines of Python that wait.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from gpu_day import cases as gpu_day_cases
from gpu_day.process import part_parser, say
from lib.launching import write_config
from lib.stages import MeasuredStage, measured_stage
from megakd.config.file import load_config
from megakd.engine.memory import peak_memory_bytes, reset_peak_memory
from megakd.run.main import started

CASES = {
    "llama": gpu_day_cases.llama_tree,
    "llama-untried": partial(gpu_day_cases.llama_tree, untried=True),
    "smollm2": gpu_day_cases.smollm2_tree,
}
# Operations are counted in the steps 1, 2, 4 and 8 of a stage, which takes a quarter longer.
WARM_UP, TIMED, COUNTED, PROFILED = 4, 3, 1, 3
# Calls after which the host has waited for the GPU.
SYNCS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
)
ATTENTION = re.compile(r"flash|fmha|attention|attn|_sdp_", re.IGNORECASE)
SHOWN = 15


def main(arguments: Sequence[str]) -> int:
    parser = part_parser(__doc__)
    parser.add_argument("case", choices=CASES)
    given = parser.parse_args(arguments)
    tree = CASES[given.case](given.folder, rehearse=given.rehearse)
    config = load_config(write_config(given.folder / "run.yaml", tree))
    with started(config) as ranks:
        began = time.perf_counter()
        with measured_stage(config, ranks) as (stage, _):
            numbers: dict[str, Any] = {"seconds to load": time.perf_counter() - began}
            steps = stage.steps_one_by_one()
            trace = given.folder / "trace.json.gz"
            for measure in (timed, partial(profiled, trace=trace), waits_by_line):
                numbers |= measure(stage, steps)
                say(numbers)
    return 0


def timed(stage: MeasuredStage, steps: Iterator[None]) -> dict[str, Any]:
    device = stage.ranks.device
    take(steps, WARM_UP, device)
    reset_peak_memory(device)
    began = time.perf_counter()
    take(steps, TIMED, device)
    seconds = (time.perf_counter() - began) / TIMED
    rows, length = stage.config.train.per_device_train_batch_size, stage.config.task.row_length
    weights = {p.dtype for p in stage.bundle.parameters()}
    model: Any = stage.bundle.student
    return {
        "student weights": sum(p.numel() for p in stage.bundle.parameters()),
        "dtype": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in weights)),
        "tokens per step": rows * length,
        "seconds per step": seconds,
        "tokens/s": rows * length / seconds,
        "peak GB": peak_memory_bytes(device) / 1e9,
        "attention of the config": model.config._attn_implementation,  # noqa: SLF001
    }


def take(steps: Iterator[None], count: int, device: torch.device) -> None:
    for _ in range(count):
        next(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waits_by_line(stage: MeasuredStage, steps: Iterator[None]) -> dict[str, Any]:
    """Return the lines at which the host waits for the GPU in one step, as torch warns of them."""
    if stage.ranks.device.type != "cuda":
        return {"lines that wait": "not known on a CPU"}
    with waits_told() as told:
        next(steps)
    lines = Counter(f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in told)
    rows = [{"line": line, "per step": count} for line, count in lines.most_common(SHOWN)]
    return {"lines that wait": rows}


@contextmanager
def waits_told() -> Iterator[list[warnings.WarningMessage]]:
    """Yield a list, which has torch's warnings of calls that wait for the GPU after the body."""
    waits: list[warnings.WarningMessage] = []
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield waits
    torch.cuda.set_sync_debug_mode("default")
    waits += [one for one in caught if "synchroniz" in str(one.message)]


def profiled(stage: MeasuredStage, steps: Iterator[None], trace: Path) -> dict[str, Any]:
    """Return what torch's profiler sees in three steps, and write the trace."""
    device = stage.ranks.device
    on_gpu = device.type == "cuda"
    take(steps, COUNTED, device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        take(steps, PROFILED, device)
    profiler.export_chrome_trace(str(trace))
    events: Any = profiler.key_averages()
    absent = "no CUDA kernels on a CPU: the operators are shown"
    return {
        "kernels": "of the GPU" if on_gpu else absent,
        "waits of the host": [
            {"call": name, "per step": sum(e.count for e in events if e.key == name) / PROFILED}
            for name in SYNCS
        ],
        "attention": [
            {"kernel": event.key, "per step": event.count / PROFILED}
            for event in events
            if ATTENTION.search(event.key)
        ],
        "most expensive": most_expensive(events, on_gpu=on_gpu),
    }


def most_expensive(events: Sequence[FunctionEventAvg], *, on_gpu: bool) -> list[dict[str, Any]]:
    """Return the kernels that take the most time, or the operators on a CPU."""
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in events
        # An operator's time on the GPU is that of its kernels, which are listed too.
        if not on_gpu or event.device_type.name == "CUDA"
    }
    whole = sum(spent.values()) or 1.0
    largest = sorted(spent, key=lambda key: -spent[key])[:SHOWN]
    return [
        {
            "kernel": str(key)[:120],
            "ms per step": spent[key] / 1e3 / PROFILED,
            "%": 100 * spent[key] / whole,
        }
        for key in largest
    ]
