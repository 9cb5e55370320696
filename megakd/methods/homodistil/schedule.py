"""When and how many units are removed: target, schedule and windows of a run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Literal, NamedTuple

from megakd.contract.stage import Window
from megakd.contract.views import View
from megakd.errors import ConfigError

Shape = Literal["cubic", "linear", "one_shot"]
Score = Literal["sensitivity", "platon", "magnitude", "random"]
POWERS: Mapping[Shape, int] = {"cubic": 3, "linear": 1}
ROWS = "pruning.json"
"""File in a stage's folder with the rows of the report."""
AVERAGES = {"sensitivity": 1, "platon": 2, "magnitude": 0, "random": 0}
"""Number of values that each score keeps for every weight."""
SHARE_OF_RUN = 0.3
"""Part of the steps after which pruning ends if the config does not say when."""
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
    there = whole.width or 0
    grid = round_to or (1 if whole.head_width is not None else DECODER_GRID)
    share = Fraction(width, there) if width else 1 - Fraction(str(sparsity))
    wanted = width or max(grid, grid * round(share * there / grid))
    if not 0 < wanted < there or wanted % grid:
        asked = (
            f"target_width: {wanted}"
            if width
            else f"target_sparsity: {sparsity:g} (width {wanted})"
        )
        raise ConfigError(_impossible(asked, there, grid))
    if grid == 1 and whole.head_width is not None:
        share = Fraction(wanted, there) if width else share
        target = Target(whole, TargetShares(Fraction(1), share, share, share))
    else:
        target = Target(whole, _on_grid(whole, share, Fraction(wanted, there), grid))
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


def _impossible(asked: str, there: int, grid: int) -> str:
    possible = [*range(grid, there, grid)]
    if not possible:
        return (
            f"method.round_to: the teacher's hidden states have {there} columns, and no multiple "
            f"of {grid} is below {there}; set method.round_to to a smaller number"
        )
    known = (
        ", ".join(map(str, possible))
        if len(possible) <= 16
        else f"{possible[0]}, {possible[1]}, … {possible[-1]}"
    )
    return (
        f"method.{asked} is not possible for a teacher of width {there}; use a width of "
        f"{known} (multiples of {grid}, see method.round_to)"
    )


class Schedule(NamedTuple):
    """Pruning from `start` to `end`, in steps that the run has taken.

    shape: see `left`.
    start, end: first and last step after which units may be removed; `one_shot` removes all units
        after `start`.
    every: steps between two removals.
    total: steps of the run.
    """

    shape: Shape
    start: int
    end: int
    every: int
    total: int

    def prunes_after(self, step: int) -> bool:
        """Return whether units are selected anew after a step; steps are counted from 1."""
        if self.shape == "one_shot":
            return step == max(1, self.start)
        if not max(1, self.start) <= step <= self.end:
            return False
        return (step - self.start) % self.every == 0 or step == self.end

    def left(self, step: int) -> Fraction:
        """Return the part of the way to the goal that is left after a step, from 1 to 0.

        With p = (step - start) / (end - start) this is (1 - p)^3 for `cubic` and 1 - p for
        `linear`; `one_shot` removes everything at once. Between two removals the part of the
        earlier removal counts.
        """
        if self.shape == "one_shot":
            return Fraction(int(step < max(1, self.start)))
        if step >= self.end:
            return Fraction(0)
        last = self.start + (step - self.start) // self.every * self.every
        done = Fraction(max(0, last - self.start), self.end - self.start)
        return (1 - done) ** POWERS[self.shape]

    def milestones(self, cuts: int) -> tuple[int, ...]:
        """Return the steps after which the masked units are cut out, at most `cuts`, rising.

        A cut follows as soon as 1/cuts, 2/cuts, … of all units that will be removed are masked.
        The end of the run is no milestone: the export cuts the model anyway.
        """
        first = max(1, self.start)
        if self.shape == "one_shot":
            return (first,) if first < self.total else ()
        removals = [*range(self.start, self.end, self.every), self.end]
        places = {
            bisect_left(removals, Fraction(number, cuts), key=lambda step: 1 - self.left(step))
            for number in range(1, cuts + 1)
        }
        return tuple(sorted(removals[place] for place in places if removals[place] < self.total))


class Scoring(NamedTuple):
    """The scores by which units are removed; see `HomoDistilConfig`.

    seed: seed of random scores.
    """

    score: Score
    sensitivity_beta: float
    uncertainty_beta: float
    monotone: bool
    seed: int


class Course(NamedTuple):
    """The run from the teacher to the student.

    teacher: name of the teacher.
    target: the units of both. schedule: when units are removed. scoring: which units.
    """

    teacher: str
    target: Target
    schedule: Schedule
    scoring: Scoring

    def windows(self, cuts: int) -> tuple[Window, ...]:
        """Return the parts of the run between at most `cuts` cuts."""
        total = self.schedule.total
        ends = (*(self.schedule.milestones(cuts) if cuts else ()), total)
        return tuple(Window(first, last, total) for first, last in pairwise((0, *ends)))
