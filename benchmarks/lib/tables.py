"""Output of the benchmarks: the machine, the spread of numbers, tables and Markdown rows."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap

from megakd.process.terminal import aligned_rows


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


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{cores} cores, {next(names, platform.processor() or platform.machine())}"


def print_rows(command: str, *rows: tuple[str, str, str]) -> None:
    print("\n| what | command | machine | numbers | spread |\n|---|---|---|---|---|")
    for what, numbers, spread in rows:
        print(f"| {what} | `{command}` | {machine()} | {numbers} | {spread} |", flush=True)


Columns = dict[str, dict[int, float]]
"""Values of a model by title and seed."""


def columns_of(
    seeds: Iterable[int], numbers: Callable[[int], Mapping[str, float | None]]
) -> Columns:
    """Return the numbers of every seed by title, without those that do not exist."""
    columns: Columns = {}
    for seed in seeds:
        for title, value in numbers(seed).items():
            if value is not None:
                columns.setdefault(title, {})[seed] = value
    return columns


def less(ours: Columns, theirs: Columns) -> Columns:
    return {
        title: {s: v - theirs[title][s] for s, v in column.items() if s in theirs[title]}
        for title, column in ours.items()
        if title in theirs
    }


def print_models(what: str, command: str, models: Mapping[str, Columns], *, reference: str) -> None:
    """Print all columns of models, and a row of each with the differences from a reference."""
    lines = {
        name: {title: _number(list(column.values())) for title, column in columns.items() if column}
        for name, columns in models.items()
    }
    print(table_of("model", lines))
    gains = {name: less(columns, models[reference]) for name, columns in models.items()}
    rows = []
    for name, line in lines.items():
        differences = ", ".join(
            f"{title} " + " ".join(f"{value:+.3g}" for value in column.values())
            for title, column in gains[name].items()
            if column and name != reference
        )
        numbers = ", ".join(f"{title} {text}" for title, text in line.items())
        rows.append((f"{what}, {name}", numbers, f"less {reference}: {differences or '-'}"))
    print_rows(command, *rows)


def _number(values: Sequence[float]) -> str:
    mean, deviation = mean_and_deviation(values)
    text = f"{mean:,.0f}" if mean >= 1000 else f"{mean:.4g}"
    return f"{text} ±{deviation:.2g}" if deviation else text


def table_of(corner: str, lines: Mapping[str, Mapping[str, str]]) -> str:
    """Return an aligned table with a column for every key; a missing value is a dash."""
    titles = list(dict.fromkeys(title for line in lines.values() for title in line))
    cells = [[name, *(line.get(title, "-") for title in titles)] for name, line in lines.items()]
    return "\n".join(aligned_rows([[corner, *titles], *cells]))


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
