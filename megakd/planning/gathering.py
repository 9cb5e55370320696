"""Weights that ZeRO 3 gathers while a model runs.

From the third step on, DeepSpeed knows the order of all modules. A module's weights are whole
while the module runs, and stay whole until their next use if that use is within the reuse
distance. Every module also prefetches weights of later modules, up to a bucket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from megakd.planning.moments import Amount, Inventory, Trace, amount_of, block

_BILLION = 1_000_000_000


class Gathered(NamedTuple):
    """Unsharded weights at one moment, and the buffer in which new weights arrive."""

    kept: Amount = Amount()
    arriving: Amount = Amount()


class Gathering(NamedTuple):
    """Gathered weights of a forward (and backward) by moment, and the number of elements."""

    moments: tuple[Gathered, ...]
    numel: int


def persistent(inventory: Inventory, zero: Mapping[str, Any]) -> set[int]:
    """Return the numbers of the parameters that are small enough to stay whole."""
    threshold = _setting(zero, "param_persistence_threshold", 100_000)
    left = _setting(zero, "model_persistence_threshold", 2**63)
    chosen = set()
    for number, parameter in enumerate(inventory):
        if parameter.numel <= threshold and parameter.numel <= left:
            chosen.add(number)
            left -= parameter.numel
    return chosen


def gathering_of(
    trace: Trace, zero: Mapping[str, Any], *, itemsize: int, in_place: bool
) -> Gathering:
    """Return the gathered weights at every moment.

    Args:
        trace: a trace of the engine's module.
        zero: the section `zero_optimization` of the DeepSpeed config.
        itemsize: bytes of a weight.
        in_place: whether a single parameter is gathered without a buffer (gloo needs a buffer).
    """
    sizes = [parameter.numel for parameter in trace.inventory]
    found: list[Gathered] = []
    numel = 0
    for whole, new in _whole_and_new(trace, sizes, zero):
        fetched = sum(sizes[n] for n in new)
        arriving = 0 if in_place and len(new) == 1 else fetched * itemsize
        found.append(Gathered(amount_of(sizes[n] * itemsize for n in whole), block(arriving)))
        numel += fetched
    return Gathering(tuple(found), numel)


def _whole_and_new(
    trace: Trace, sizes: Sequence[int], zero: Mapping[str, Any]
) -> Iterator[tuple[set[int], set[int]]]:
    used = [moment.used for moment in trace.moments]
    bucket = _setting(zero, "prefetch_bucket_size", 50_000_000)
    live = _setting(zero, "max_live_parameters", _BILLION)
    reuses = _reuses(used, sizes, _setting(zero, "max_reuse_distance", _BILLION))
    until = dict.fromkeys(persistent(trace.inventory, zero), len(used))  # the last moment of each
    waiting = deque((moment, number) for moment, own in enumerate(used) for number in sorted(own))
    whole = set[int]()
    for now, own in enumerate(used):
        while waiting and waiting[0][0] <= now:
            waiting.popleft()
        kept = {number for number in whole if until.get(number, -1) >= now}
        whole = own | kept
        room = min(live - sum(sizes[n] for n in whole), bucket)
        while waiting and room > 0:
            when, number = waiting.popleft()
            until[number] = max(until.get(number, -1), when)
            room -= 0 if number in whole else sizes[number]
            whole.add(number)
        yield whole, whole - kept
        for number in own:
            until[number] = max(until.get(number, -1), reuses.get((now, number), now))


def _reuses(
    used: Sequence[set[int]], sizes: Sequence[int], reuse: int
) -> dict[tuple[int, int], int]:
    """Return the next use of each parameter after each use, if it is within the reuse distance."""
    # distance[b] - distance[a]: elements that the moments from a to b - 1 use.
    distance = [0, *accumulate(sum(sizes[n] for n in numbers) for numbers in used)]
    last: dict[int, int] = {}
    found = {}
    for moment, numbers in enumerate(used):
        for number in numbers:
            before = last.get(number)
            if before is not None and distance[moment] - distance[before + 1] < reuse:
                found[before, number] = moment
            last[number] = moment
    return found


def _setting(zero: Mapping[str, Any], name: str, default: int) -> int:
    return int(zero.get(f"stage3_{name}", zero.get(name, default)))
