"""The student's units, from the target of the config and the teacher's units."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from megakd.errors import ConfigError
from megakd.methods.homodistil.schedule import Target, TargetShares

if TYPE_CHECKING:
    from megakd.contract.views import View

DECODER_GRID = 64
"""Multiple of widths and neurons of students that lose whole heads, as servers expect."""


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
    if grid == 1:
        share = Fraction(wanted, there) if width else share
        found = Target(whole, TargetShares(Fraction(1), share, share, share))
    else:
        found = Target(whole, _on_grid(whole, share, Fraction(wanted, there), grid))
    _check_goal(found)
    return found


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
