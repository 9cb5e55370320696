"""Weights that ZeRO 3 gathers, keeps and frees while a model runs, as DeepSpeed's coordinator does.

From the third step on, DeepSpeed knows the order of all modules. It gathers a module's weights
when the module is entered, and prefetches the weights of the next modules, up to a bucket. It
frees a module's weights after use unless they are used again within the reuse distance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from megakd.planning.moments import NOTHING, Amount, Inventory, Moment, amount_of, block

_BILLION = 1_000_000_000


class Gathered(NamedTuple):
    """Unsharded weights at one moment, and temporary copies made by a collective."""

    kept: Amount
    arriving: Amount


class Gathering(NamedTuple):
    """Gathered weights of a forward (and backward) by moment, and the number of elements."""

    moments: tuple[Gathered, ...]
    numel: int


def persistent(inventory: Inventory, zero: Mapping[str, Any]) -> set[int]:
    """Return the numbers of the parameters that are small enough to stay whole."""
    threshold = _setting(zero, "param_persistence_threshold", 100_000)
    left = _setting(zero, "model_persistence_threshold", 2**63)
    chosen = set()
    for number, parameter in enumerate(inventory.parameters):
        if parameter.numel <= threshold and parameter.numel <= left:
            chosen.add(number)
            left -= parameter.numel
    return chosen


class Coordinator:
    """Simulates one pass over the moments of a trace."""

    def __init__(
        self, inventory: Inventory, zero: Mapping[str, Any], *, itemsize: int, in_place: bool
    ) -> None:
        """Store the model and its `zero_optimization` settings.

        Args:
            inventory: the parameters of the engine's module.
            zero: the section of the DeepSpeed config.
            itemsize: bytes of a weight.
            in_place: whether a single parameter is gathered without a buffer (gloo needs a buffer).
        """
        self._sizes = [parameter.numel for parameter in inventory.parameters]
        self._itemsize, self._in_place = itemsize, in_place
        self._kept = persistent(inventory, zero)
        self._prefetch = _setting(zero, "prefetch_bucket_size", 50_000_000)
        self._reuse = _setting(zero, "max_reuse_distance", _BILLION)
        self._live = _setting(zero, "max_live_parameters", _BILLION)
        self._here: set[int] = set()
        self._queue: deque[tuple[int, int]] = deque()
        self._fetched_for: dict[int, int] = {}
        self.numel = 0

    def play(self, moments: Sequence[Moment]) -> Gathering:
        """Return the gathered weights at every moment."""
        steps = [sorted(set(moment.own) | moment.used) for moment in moments]
        self._queue = deque((n, step) for step, own in enumerate(steps) for n in own)
        said = []
        for step, own in enumerate(steps):
            arriving = self._fetch(set(own) - self._here)
            self._skip(own, step)
            arriving = arriving.plus(self._fetch(self._next()))
            said.append(Gathered(self._bytes(self._here), arriving))
            self._release(own, steps, step)
        return Gathering(tuple(said), self.numel)

    def _skip(self, own: Sequence[int], step: int) -> None:
        waiting = {n for n in own if self._fetched_for.get(n, -1) < step}
        while self._queue and waiting:
            number, used = self._queue.popleft()
            self._fetched_for[number] = used
            waiting.discard(number)

    def _next(self) -> set[int]:
        """Return the parameters to prefetch: the next parameters that are not present yet."""
        room = min(self._live - sum(self._sizes[n] for n in self._here), self._prefetch)
        chosen: set[int] = set()
        numel = 0
        while self._queue and numel < room:
            number, used = self._queue.popleft()
            self._fetched_for[number] = max(self._fetched_for.get(number, -1), used)
            if number not in self._here and number not in chosen:
                chosen.add(number)
                numel += self._sizes[number]
        return chosen

    def _fetch(self, numbers: set[int]) -> Amount:
        if not numbers:
            return NOTHING
        self._here |= numbers
        numel = sum(self._sizes[n] for n in numbers)
        self.numel += numel
        # Several parameters are gathered through one common buffer.
        if len(numbers) == 1 and self._in_place:
            return NOTHING
        return block(numel * self._itemsize)

    def _release(self, own: Sequence[int], steps: Sequence[Sequence[int]], step: int) -> None:
        going = {n for n in own if n not in self._kept}
        going -= {n for n in own if self._fetched_for.get(n, -1) > step}
        distance = 0
        for later in islice(steps, step + 1, None):
            if distance >= self._reuse or not going:
                break
            going.difference_update(later)
            distance += sum(self._sizes[n] for n in later)
        self._here -= going

    def _bytes(self, numbers: set[int]) -> Amount:
        return amount_of(self._sizes[n] * self._itemsize for n in numbers)


def _setting(zero: Mapping[str, Any], name: str, default: int) -> int:
    return int(zero.get(f"stage3_{name}", zero.get(name, default)))
