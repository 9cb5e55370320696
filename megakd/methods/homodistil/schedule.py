"""When and how many units are removed: target, schedule and windows of a run."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from megakd.contract.stage import Window
from megakd.contract.views import View
from megakd.errors import ConfigError

ROWS = "pruning.json"
"""File in a stage's folder with the rows of the report."""
DECODER_GRID = 64
"""Multiple of widths and neurons of students that lose whole heads, as servers expect."""


class TargetShares(NamedTuple):
    """The share of the units of each kind that the student keeps."""

    heads: Fraction
    neurons: Fraction
    width: Fraction
    head_width: Fraction


class Target(NamedTuple):
    """The units of the teacher, and the shares of them that the student keeps.

    whole: `head_width` is set if the columns of heads are pruned instead of whole heads.
    """

    whole: View
    shares: TargetShares

    def at(self, left: Fraction) -> View:
        """Return the units that remain when `left` of the way to the student is left, 1 to 0."""
        whole, shares = self
        parts = TargetShares(*(share + (1 - share) * left for share in shares))
        columns = whole.head_width
        return View(
            tuple(round(parts.heads * count) for count in whole.heads),
            tuple(round(parts.neurons * count) for count in whole.neurons),
            round(parts.width * (whole.width or 0)),
            None if columns is None else round(parts.head_width * columns),
        )

    @property
    def goal(self) -> View:
        return self.at(Fraction(0))


def target_of(
    whole: View, *, width: int | None, sparsity: float | None, round_to: int | None
) -> Target:
    """Return the target: the same share of every kind of units, on a grid if there is one.

    Args:
        round_to: `method.round_to`; None: 1 if columns of heads are pruned, else 64.
    """
    if whole.width is None:
        raise ConfigError(
            "method: homodistil narrows hidden states, which a teacher of this family cannot lose: "
            "its heads and neurons can be cut alone; use shrink, minidisc or direct"
        )
    before = whole.width
    grid = round_to or (1 if whole.head_width is not None else DECODER_GRID)
    share = Fraction(width, before) if width else 1 - Fraction(str(sparsity))
    after = width or max(grid, grid * round(share * before / grid))
    if not 0 < after < before or after % grid:
        asked = (
            f"target_width: {after}" if width else f"target_sparsity: {sparsity:g} (width {after})"
        )
        raise ConfigError(
            f"method.{asked} is not possible for a teacher of width {before}; use a multiple of "
            f"{grid} (method.round_to) below it"
        )
    if grid == 1 and whole.head_width is not None:
        target = Target(whole, TargetShares(Fraction(1), share, share, share))
    else:
        target = Target(whole, _on_grid(whole, share, Fraction(after, before), grid))
    _check_goal(target)
    return target


def _on_grid(whole: View, share: Fraction, width: Fraction, grid: int) -> TargetShares:
    """Return shares that give multiples of the grid, and whole heads unless columns are pruned."""
    # A teacher that was cut may have layers without heads or neurons.
    neurons, heads = max(whole.neurons), max(whole.heads)
    kept = max(grid, grid * round(share * neurons / grid))
    of_neurons = min(Fraction(kept, neurons), Fraction(1)) if neurons else Fraction(1)
    if whole.head_width is not None:
        return TargetShares(Fraction(1), of_neurons, width, share)
    of_heads = Fraction(max(1, round(share * heads)), heads) if heads else Fraction(1)
    return TargetShares(of_heads, of_neurons, width, Fraction(1))


def _check_goal(target: Target) -> None:
    whole, goal = target.whole, target.goal
    kept = {
        "heads": zip(whole.heads, goal.heads, strict=True),
        "neurons": zip(whole.neurons, goal.neurons, strict=True),
        "columns of hidden states": [(1, goal.width or 0)],
        "columns of heads": [(1, 1 if goal.head_width is None else goal.head_width)],
    }
    empty = [name for name, counts in kept.items() if any(a and not b for a, b in counts)]
    if empty:
        raise ConfigError(
            f"method.target_width or method.target_sparsity leaves a layer without "
            f"{' and '.join(empty)}: the student would have {goal.heads[0]} heads, "
            f"{goal.neurons[0]} neurons, a width of {goal.width} and {goal.head_width} columns per "
            "head; raise the width or lower the sparsity"
        )


class Schedule(NamedTuple):
    """Pruning from `start` to `end`, in steps that the run has taken.

    start, end: first and last step after which units may be removed; all at once if equal.
    every: steps between two removals.
    total: steps of the run.
    """

    start: int
    end: int
    every: int
    total: int

    def prunes_after(self, step: int) -> bool:
        """Return whether units are selected anew after a step; steps are counted from 1."""
        if not max(1, self.start) <= step <= self.end:
            return False
        return (step - self.start) % self.every == 0 or step == self.end

    def left(self, step: int) -> Fraction:
        """Return the part of the way to the goal that is left after a step, from 1 to 0.

        It is (1 - p)^3 with p = (step - start) / (end - start). Between two removals the part of
        the earlier removal counts.
        """
        if step >= self.end:
            return Fraction(0)
        if step <= self.start:
            return Fraction(1)
        last = (step - self.start) // self.every * self.every
        return (1 - Fraction(last, self.end - self.start)) ** 3

    def windows(self, cuts: int) -> tuple[Window, ...]:
        """Return the parts of the run between at most `cuts` cuts of masked units.

        A cut follows as soon as 1/cuts, 2/cuts, … of all units that will be removed are masked.
        The end of the run is no cut of its own: the export cuts the model anyway.
        """
        removals = [*range(self.start, self.end, self.every), self.end]
        places = {
            bisect_left(removals, Fraction(number, cuts), key=lambda step: 1 - self.left(step))
            for number in range(1, cuts + 1)
        }
        ends = sorted(removals[place] for place in places if removals[place] < self.total)
        return tuple(
            Window(first, last, self.total) for first, last in pairwise((0, *ends, self.total))
        )
