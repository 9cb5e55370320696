"""Lists on a command line, separated by commas."""

from __future__ import annotations


def integers(text: str) -> list[int]:
    """`1,2,3`."""
    return [int(part) for part in text.split(",")]


def fractions(text: str) -> list[float]:
    """`0.5,0.9`."""
    return [float(part) for part in text.split(",")]
