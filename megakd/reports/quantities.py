"""Numbers of a report as text, with units."""

from __future__ import annotations

import sys
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value of report.json is a finite number; NaN is stored as null."""
    is_bool = isinstance(value, bool)
    return not is_bool and isinstance(value, int | float) and abs(value) <= sys.float_info.max


def step_time(seconds: float) -> str:
    """Return the duration of a step as text, in milliseconds below a second."""
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


def megabytes(size: float) -> str:
    """Return a size in bytes as a number of decimal megabytes."""
    return f"{size / 1e6:,.1f}"


def gigabytes(size: float) -> str:
    """Return a size in bytes as text in decimal gigabytes."""
    return f"{size / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Return a duration as hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{seconds:.1f}s"
