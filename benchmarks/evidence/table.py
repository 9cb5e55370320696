"""The table of a comparison: each arm against its reference arm, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import ttest_1samp

from evidence.comparisons import Comparison
from evidence.run import Basis, Cell, Cells
from lib.tables import mean_and_deviation, table_of


def table(comparison: Comparison, cells: Cells, basis: Basis) -> str:
    """Return a row per arm with its mean over the seeds and its difference from the reference.

    The reference arm always has equal steps. The interval is that of the paired t-test; the last
    column is the p-value after Holm over the arms of the table.
    """
    lines, p_values = dict[str, dict[str, str]](), dict[str, float]()
    for arm in comparison.arms:
        ours, reference = by_seed(cells, arm, basis), comparison.reference_of(arm)
        if not ours:
            continue
        mean, deviation = mean_and_deviation([cell.score for cell in ours.values()])
        lines[arm] = {
            "seeds": str(len(ours)),
            "points": f"{mean:.2f} ±{deviation:.2f}",
            "KL": f"{statistics.fmean(cell.divergence for cell in ours.values()):.4f}",
            "steps": f"{statistics.fmean(cell.steps for cell in ours.values()):.0f}",
            "CPU s": f"{statistics.fmean(cell.cpu_seconds for cell in ours.values()):.0f}",
        }
        theirs = by_seed(cells, reference, "steps")
        gains = [ours[seed].score - theirs[seed].score for seed in ours if seed in theirs]
        if arm == reference or not gains:
            continue
        low, high, p_values[arm] = paired(gains)
        lines[arm] |= {
            "against": reference,
            "difference": f"{statistics.fmean(gains):+.2f}",
            "95 %": "-" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}",
        }
    for arm, p in holm(p_values).items():
        lines[arm]["p, Holm"] = "-" if math.isnan(p) else f"{p:.3f}"
    return table_of("arm", lines)


def by_seed(cells: Cells, arm: str, basis: Basis) -> dict[int, Cell]:
    return {seed: c for (name, seed, on), c in cells.items() if (name, on) == (arm, basis)}


def paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return the 95 % interval of the mean and the p-value; NaN for one seed or no spread."""
    if len(differences) < 2 or statistics.stdev(differences) < 1e-9:
        return math.nan, math.nan, math.nan
    tested: Any = ttest_1samp(differences, 0.0)
    interval = tested.confidence_interval()
    return float(interval.low), float(interval.high), float(tested.pvalue)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Return the p-values after Holm's correction; NaN is no test."""
    tested = sorted((p, arm) for arm, p in p_values.items() if not math.isnan(p))
    adjusted, largest = dict.fromkeys(p_values, math.nan), 0.0
    for place, (p, arm) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - place) * p))
        adjusted[arm] = largest
    return adjusted
