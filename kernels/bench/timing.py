"""Times of a function: many runs, warm, with the device's caches cleared before each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_FLUSHED_BYTES = 256 << 20  # more than any GPU's last-level cache
_MOST_RUNS = 200


class Effort(NamedTuple):
    """Seconds of one round of runs, which has at least `least_runs` runs."""

    round_s: float
    least_runs: int


class Times(NamedTuple):
    """Milliseconds over both rounds; noise is how far their medians are apart, relative."""

    median: float
    p20: float
    p80: float
    noise: float


def sample_ms(
    function: Callable[[], object],
    device: torch.device,
    effort: Effort,
    *,
    before: Callable[[], None] = lambda: None,
    during: Callable[[], None] = lambda: None,
) -> tuple[float, ...]:
    """The times of one round of a function that has run before.

    before: called before every run, not timed. during: called once on CUDA, while the runs that
        are queued are busy.
    """
    if device.type == "cuda":
        return _sample_cuda(function, device, effort, before=before, during=during)
    times: list[float] = []
    while not _is_enough(times, effort):
        before()
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return tuple(times)


def summarise(rounds: list[tuple[float, ...]]) -> Times:
    """Median and spread of all rounds together; at least two times in all."""
    medians = [statistics.median(times) for times in rounds]
    together = [each for times in rounds for each in times]
    fifths = statistics.quantiles(together, n=5, method="inclusive")
    median = statistics.median(together)
    return Times(median, fifths[0], fifths[-1], (max(medians) - min(medians)) / median)


def _is_enough(times: list[float], effort: Effort) -> bool:
    long_enough = sum(times) >= effort.round_s * 1e3 and len(times) >= effort.least_runs
    return long_enough or len(times) >= _MOST_RUNS


def _sample_cuda(
    function: Callable[[], object],
    device: torch.device,
    effort: Effort,
    *,
    before: Callable[[], None],
    during: Callable[[], None],
) -> tuple[float, ...]:
    """Events around each run; the runs are queued, so that the host's pauses do not count."""
    flushed = torch.empty(_FLUSHED_BYTES // 4, dtype=torch.int32, device=device)

    def enqueue() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        flushed.zero_()
        start.record()
        function()
        end.record()
        return start, end

    def finished(events: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        torch.cuda.synchronize(device)
        return events[0].elapsed_time(events[1])

    once_ms = max(finished(enqueue()), 1e-3)
    runs = int(effort.round_s * 1e3 / once_ms)
    events = [enqueue() for _ in range(min(max(runs, effort.least_runs), _MOST_RUNS))]
    during()
    torch.cuda.synchronize(device)
    return tuple(start.elapsed_time(end) for start, end in events)
