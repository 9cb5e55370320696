"""Numbers of a report as text, with units."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value of report.json is a finite number; NaN is stored as null."""
    is_bool = isinstance(value, bool)
    return not is_bool and isinstance(value, int | float) and abs(value) <= sys.float_info.max


def step_time(seconds: float | None) -> str:
    """Return the duration of a step as text, in milliseconds below a second."""
    if not is_number(seconds):
        return "-"
    if seconds >= 60:
        return duration(seconds)
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def short_count(number: float, form: str = ".2f") -> str:
    """Return a number with a unit from a thousand on, such as 22.71M."""
    if abs(number) < 1000:
        return f"{number:.4g}" if abs(number) > 1e-12 else "0"
    shown = {unit: f"{number / size:{form}}" for unit, size in (("k", 1e3), ("M", 1e6), ("B", 1e9))}
    # 999,999 is 1.00M, not 1000.00k.
    unit = next((unit for unit, text in shown.items() if abs(float(text)) < 1000), "B")
    return shown[unit] + unit


def gigabytes(size: float) -> str:
    """Return a size in bytes as text in decimal gigabytes."""
    return f"{size / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Return a duration as hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{seconds:.1f}s"


class Ratio(NamedTuple):
    """The median of the ratios of several rounds, and their range.

    is_clear: false if noise may explain the difference to 1.
    """

    median: float
    low: float
    high: float
    is_clear: bool

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.2f}x"
        span = f"{self.low:.2f}-{self.high:.2f}"
        return f"{self.median:.2f}x ({span})" if self.is_clear else f"{span}x"


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Return the ratio of two quantities that were measured in the same rounds.

    All of five rounds, and all but the lowest and the highest of eight or more, have the true
    median in their range with a probability of 93 % or more. Fewer rounds give no clear ratio.
    """
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=False))
    outside = 1 if len(ratios) >= 8 else 0
    low, high = ratios[outside], ratios[-1 - outside]
    is_clear = low == high or (len(ratios) >= 5 and not low < 1 < high)
    return Ratio(statistics.median(ratios), low, high, is_clear)
