"""The rule for a rank that is slow: all other ranks wait for it in every step."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

SLOW, LOGS, LEAST_S = 1.3, 5, 0.1
"""A rank is slow if it computes longer than this multiple of the median, in so many logs in a row;
differences below the last number of seconds do not count."""


class SlowRank:
    """Tells which rank has been slow for some time."""

    def __init__(self) -> None:
        self._slowest, self._times = -1, 0

    def add(self, computing: Sequence[float]) -> int | None:
        """Add each rank's seconds of a log; return a rank that is slow for the `LOGS`-th time."""
        most, median = max(computing), median_low(computing)
        slowest = computing.index(most)
        if most < SLOW * median or most - median < LEAST_S:
            slowest = -1
        self._times = self._times + 1 if slowest == self._slowest else 1
        self._slowest = slowest
        return slowest if slowest >= 0 and self._times == LOGS else None
