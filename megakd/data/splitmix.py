"""Random numbers of SplitMix64 (Steele, Lea and Flood 2014): one stream per row and draw.

A number is a pure function of (seed, draw, row, domain, counter). It does not depend on the split
of a step into ranks and micro-batches, or on where a run was resumed. B is the number of rows of a
micro-batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def row_keys(
    seed: int, draw: int | NDArray[np.int64], rows: NDArray[np.int64], *, size: int, domain: int = 0
) -> NDArray[np.uint64]:
    """Return the keys [B] of the streams of a micro-batch's rows.

    `draw` is the number of the draw, such as the epoch, for all rows or by row. `rows` are numbers
    of at least 0; further rows, up to `size`, are dummy rows, on whose keys nothing may depend. The
    streams of two domains are independent.
    """
    parts = np.zeros((3, size), dtype=np.uint64)
    parts[0] = seed
    parts[1, : len(rows)] = draw
    parts[2, : len(rows)] = rows
    key = np.zeros(size, dtype=np.uint64)
    for part in parts:
        key = _mixed(key + part + _GOLDEN)
    return _mixed(key + np.uint64(domain) + _GOLDEN) if domain else key


def uniform(keys: NDArray[np.uint64], counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return the numbers in [0, 1) at places of streams."""
    values = _mixed(keys + counters * _GOLDEN) >> np.uint64(11)
    return values.astype(np.float64) * 2.0**-53


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))
