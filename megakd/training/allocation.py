"""Sparsity allocation of MiniDisc: the units that a sub-network of a given sparsity keeps.

Zhang et al. 2024, https://arxiv.org/abs/2205.14570, as in the authors' code. The file does not
import torch: scores, views and orders are numbers that configs, files and reports can hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megakd.errors import ConfigError, TeacherError
from megakd.models.views import Allocation, UnitOrder, View

if TYPE_CHECKING:
    from megakd.models.fitting import ModelSource

BATCH_ROWS = 32
"""Rows of a batch over all ranks, of whose gradient importance is the absolute value."""

Layers = tuple[tuple[float, ...], ...]
"""One number per unit, layer by layer."""

# Names of the layers of a kind, and of their units, in messages.
_NAMES = {
    "heads": ("attention", "attention heads (key-value groups where heads share keys)"),
    "neurons": ("feed-forward", "neurons"),
}
SMALLEST_NORM = 1e-17
"""Added to norms, so that scores of zero stay zero; the value of the authors' code."""


class UnitScores(NamedTuple):
    """Importance of the units of a model; only the ratios of the scores of a kind have a meaning.

    heads: per attention, one score per key-value group.
    neurons: per feed-forward, one score per neuron.
    """

    heads: Layers
    neurons: Layers

    def scaled(self) -> UnitScores:
        """Return the scores of each layer divided by their L2 norm, as in the authors' code."""
        return UnitScores(tuple(map(_scaled, self.heads)), tuple(map(_scaled, self.neurons)))


def _scaled(layer: Sequence[float]) -> tuple[float, ...]:
    values = np.asarray(layer, dtype=float)
    return tuple((values / (np.linalg.norm(values) + SMALLEST_NORM)).tolist())


class Rounding(NamedTuple):
    """Units are removed in multiples of `step`; a layer keeps at least `least` of them, or none.

    Halves are rounded to the even number, as in Python.
    """

    step: int
    least: int

    @staticmethod
    def for_rows(rows: int, round_to: int) -> Rounding:
        """Return the rounding for units of `rows` rows, cut in multiples of `round_to` rows."""
        return Rounding(round_to // math.gcd(round_to, rows), -(-round_to // rows))

    def remaining(self, count: int, removed: int, *, never_all: bool = False) -> int:
        """Return the number of units to keep out of `count`."""
        removed = min(self.step * round(removed / self.step), count)
        if count - removed >= self.least or not removed:
            return count - removed
        return count - max(count - self.least, 0) // self.step * self.step if never_all else 0


def unit_order(scores: UnitScores) -> UnitOrder:
    """Return the units of each layer sorted by score, the highest first; ties keep their order."""
    return UnitOrder(
        heads=tuple(_falling(layer) for layer in scores.heads),
        neurons=tuple(_falling(layer) for layer in scores.neurons),
    )


def _falling(layer: Sequence[float]) -> tuple[int, ...]:
    return tuple(np.argsort(-np.asarray(layer), kind="stable").tolist())


def view_at(
    scores: UnitScores,
    sparsity: float,
    *,
    allocation: Allocation = "global",
    round_to: int = 8,
    head_width: int = 64,
    with_heads: Collection[int] = (),
) -> View:
    """Return the sub-network that leaves out a share of the heads and a share of the neurons.

    The heads of all layers are ranked together, and the round(sparsity * heads) least important
    heads are left out; likewise for the neurons. The cut of each layer is then rounded to a
    multiple of `round_to` rows, and a layer with fewer remaining rows keeps none. A view contains
    every view of higher sparsity.

    Differs from the authors' code: if the rows of a head are not a multiple of `round_to`, whole
    heads are removed together, as many as form a multiple.

    Args:
        allocation: `uniform` removes the same share of every layer; otherwise as above.
        head_width: rows of a head's queries, keys and values; 64 as in the paper's models.
        with_heads: attentions, numbered from 0, that keep their most important head at any
            sparsity.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(
            "a sparsity is the share of units to remove, and must be at least 0 and below 1 (got "
            f"{sparsity})"
        )
    # The decimal number that is written: 0.35 of 90 is 31.5, unlike in floating point.
    share = Fraction(str(float(sparsity)))
    of_heads, of_neurons = Rounding.for_rows(head_width, round_to), Rounding.for_rows(1, round_to)
    fewest = [of_heads.least if n in with_heads else 0 for n in range(len(scores.heads))]
    cuts, problems = list[tuple[int, ...]](), list[str | None]()
    for kind, rounding, least in (
        ("heads", of_heads, fewest),
        ("neurons", of_neurons, [0] * len(scores.neurons)),
    ):
        layers: Layers = getattr(scores, kind)
        if allocation == "uniform":
            removed = [round(share * len(layer)) for layer in layers]
        else:
            removed = _least_important(layers, share, least)
        counts = [len(layer) for layer in layers]
        rows = zip(counts, removed, least, strict=True)
        left = tuple(rounding.remaining(n, lost, never_all=few > 0) for n, lost, few in rows)
        problem = _without_units(kind, rounding, counts, removed, left)
        cuts.append(left)
        problems.append(problem if allocation == "uniform" or not any(left) else None)
    for problem in filter(None, problems):
        raise TeacherError(
            f"{problem} (at sparsity {sparsity:g}); lower method.target_sparsity and the "
            "highest method.sparsities (if any), lower method.round_to, or use a wider teacher"
        )
    return View(cuts[0], cuts[1])


@dataclass(frozen=True, kw_only=True)
class SortedTeacher:
    """A model with units sorted by importance, the most important first, and the scores.

    scores: scores of the units in the teacher's original order.
    """

    source: ModelSource
    scores: UnitScores

    def view_at(
        self,
        sparsity: float,
        *,
        allocation: Allocation,
        round_to: int,
        with_heads: Collection[int] = (),
    ) -> View:
        """Return the prefix of every layer that remains at a sparsity; see `allocation.view_at`."""
        architecture, config = self.source.architecture, self.source.config
        if not architecture.found_units(config).heads.can_lose_all:
            with_heads = [number for number, one in enumerate(self.scores.heads) if one]
        return view_at(
            self.scores.scaled(),
            sparsity,
            allocation=allocation,
            round_to=round_to,
            head_width=architecture.rows_of_heads(config),
            with_heads=with_heads,
        )


def _without_units(
    kind: str,
    rounding: Rounding,
    counts: Sequence[int],
    removed: Sequence[int],
    left: Sequence[int],
) -> str | None:
    """Return a message if layers lose all units; it names that with the most before rounding."""
    empty = {n: counts[n] - removed[n] for n in range(len(counts)) if counts[n] and not left[n]}
    if not empty:
        return None
    last = max(empty, key=empty.__getitem__)
    layer, units = _NAMES[kind]
    text = (
        f"no {units} of the teacher are left: {layer} {last + 1} of {len(counts)} has "
        f"{counts[last]} and would keep {empty[last]}"
    )
    if not empty[last]:
        return text
    return (
        f"{text}; rounding removes units in steps of {rounding.step} and keeps at least "
        f"{rounding.least} or none"
    )


def _least_important(layers: Layers, share: Fraction, fewest: Sequence[int]) -> list[int]:
    # Return the units that each layer loses if the units of all layers are ranked together.
    # The `fewest` most important units of each layer are removed after all other units.
    scores = np.concatenate([np.asarray(layer, dtype=float) for layer in layers])
    layer_of = np.concatenate([np.full(len(layer), i) for i, layer in enumerate(layers)])
    place = np.concatenate([np.arange(len(layer)) for layer in layers])
    spared = np.concatenate(
        [np.isin(range(len(a)), _falling(a)[:n]) for a, n in zip(layers, fewest, strict=True)]
    )
    # By rising score. Of equal scores, the last units of a layer are removed first, consistent
    # with `unit_order`.
    rising = np.lexsort((-layer_of, -place, scores, spared))
    lost = layer_of[rising[: round(share * len(scores))]]
    return np.bincount(lost, minlength=len(layers)).tolist()
