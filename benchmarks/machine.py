"""Shared output of the benchmarks: the machine, the spread of numbers, and a Markdown row."""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from scipy.stats import t as student_t

if TYPE_CHECKING:
    from collections.abc import Sequence

TITLES = ("what", "command", "machine", "numbers", "spread")


class Spread(NamedTuple):
    """A median, the middle half of the values, and a 95 % bootstrap interval of the median."""

    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]


def spread_of(values: Sequence[float], *, resamples: int = 2000) -> Spread:
    """Return the spread of at least two values; the same at every call."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    rng = random.Random(0)
    medians = sorted(
        statistics.median(rng.choices(values, k=len(values))) for _ in range(resamples)
    )
    interval = (medians[int(0.025 * resamples)], medians[int(0.975 * resamples)])
    return Spread(statistics.median(values), (low, high), interval)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample's standard deviation, 0 of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean with Student's 95 % interval; NaN around a single value."""
    mean, deviation = mean_and_deviation(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    reach = float(student_t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def machine() -> str:
    """Cores and the processor's model."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {_processor()}"


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def markdown_row(what: str, command: str, numbers: str, spread: str) -> str:
    """One row for the table in docs/measurements.md, with the machine filled in."""
    return f"| {what} | `{command}` | {machine()} | {numbers} | {spread} |"


def print_row(row: str) -> None:
    """The row with its titles, ready to be copied."""
    print(f"\n| {' | '.join(TITLES)} |\n|{'---|' * len(TITLES)}\n{row}", flush=True)
