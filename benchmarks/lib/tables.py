"""Output of the benchmarks: the machine, the spread of numbers, tables and Markdown rows."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap
from scipy.stats import t as student_t

SAME_COST = 0.1
"""Two costs that differ by a smaller share count as equal."""
TITLES = ("what", "command", "machine", "numbers", "spread")


class Spread(NamedTuple):
    """A median, the middle half of the values, and a 95 % bootstrap interval of the median."""

    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]

    def between(self, decimals: int = 3) -> str:
        low, high = self.interval
        return f"{low:.{decimals}f} to {high:.{decimals}f}"


def spread_of(values: Sequence[float]) -> Spread:
    """Return the spread of at least two values; the same at every call."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    drawn = bootstrap((values,), np.median, n_resamples=2000, method="percentile", rng=0)
    interval = drawn.confidence_interval
    return Spread(middle, (low, high), (float(interval.low), float(interval.high)))


def ratio_of(pairs: Sequence[Sequence[float]]) -> Spread:
    return spread_of([pair[0] / pair[1] for pair in pairs])


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample's standard deviation, which is 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def mean_text(values: Sequence[float], decimals: int) -> str:
    """Return the mean and the deviation, or a dash without values."""
    if not values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{decimals}f} ±{deviation:.{decimals}f}"


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean with Student's 95 % interval, which is NaN around a single value."""
    mean, deviation = mean_and_deviation(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    reach = float(student_t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def machine() -> str:
    """Return the number of cores and the processor's model."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{cores} cores, {next(names, platform.processor() or platform.machine())}"


def print_rows(command: str, *rows: tuple[str, str, str]) -> None:
    """Print rows for notebook/measurements.md: what, numbers and spread of each."""
    print(f"\n| {' | '.join(TITLES)} |\n|{'---|' * len(TITLES)}")
    for what, numbers, spread in rows:
        print(f"| {what} | `{command}` | {machine()} | {numbers} | {spread} |", flush=True)


def print_scores(
    what: str,
    command: str,
    scores: Mapping[str, Sequence[float]],
    *,
    decimals: int = 4,
    extra: Sequence[str] = (),
) -> None:
    """Print the row of scores over seeds, by name; `extra` are further parts of the numbers."""
    pairs = {name: mean_and_deviation(values) for name, values in scores.items() if values}
    means = [f"{name} {mean:.{decimals}f}" for name, (mean, _) in pairs.items()]
    deviations = [f"{name} {sd:.{decimals}f}" for name, (_, sd) in pairs.items()]
    print_rows(command, (what, "; ".join([*means, *extra]), "sd: " + "; ".join(deviations)))


def yes_or_no(is_met: object) -> str:
    return "yes" if is_met else "no"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def table_of(corner: str, lines: Mapping[str, Mapping[str, str]]) -> str:
    """Return an aligned table with a column for every key; a missing value is a dash."""
    titles = list(dict.fromkeys(title for line in lines.values() for title in line))
    cells = [[name, *(line.get(title, "-") for title in titles)] for name, line in lines.items()]
    return aligned([[corner, *titles], *cells])


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with a column for every key; a missing value is an empty cell."""
    titles = list(dict.fromkeys(key for row in rows for key in row))
    lines = [titles, ["---"] * len(titles)]
    lines += [[_cell(row.get(title)) for title in titles] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
