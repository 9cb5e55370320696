"""Tables of the evidence: the arms of a comparison in a setting, with their differences."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from evidence_cells import BASES, SAME_RUN
from evidence_sentences import NONE, signed
from evidence_statistics import unit_of
from gpu_day_page import markdown_table
from machine import mean_and_deviation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from evidence_cells import Cell, Stored
    from evidence_gates import Assessed, Group
    from evidence_statistics import Difference


def compared_table(one: Assessed, groups: Iterable[Group]) -> str:
    """Return the Markdown table of the groups that are compared; the reference arms are bold."""
    shown = [
        _row(one, arm, is_reference=arm == group.reference)
        for group in groups
        for arm in sorted(group.arms, key=lambda arm: arm != group.reference)
    ]
    return markdown_table(shown)


def plain_table(stored: Stored, groups: Iterable[Group]) -> str:
    """Return the Markdown table of cells that are not compared."""
    return markdown_table([_cells_of(stored, arm) for group in groups for arm in group.arms])


def _row(one: Assessed, arm: str, *, is_reference: bool) -> dict[str, str]:
    by_basis = {d.basis: d for d in one.differences if d.arm == arm}
    found = [by_basis.get(basis) for basis in BASES]
    cells = _cells_of(one.stored, arm)
    texts = [_difference_text(one.stored, each) for each in found]
    if is_reference:
        cells["arm"], texts = f"**{arm}**", ["reference", "reference"]
    tests = {
        "equal steps (95 %)": texts[0],
        "equal cost (95 %)": texts[1],
        "p after Holm": _both(found, lambda each: p_text(each.adjusted)),
        "verdict": " / ".join(dict.fromkeys(each.verdict for each in found if each)) or NONE,
        "pairs needed": _both(found, lambda each: str(each.pairs_needed or NONE)),
    }
    first = {key: cells.pop(key) for key in ("arm", "seeds", "score (sd)")}
    return {**first, **tests, **cells}


def _difference_text(stored: Stored, each: Difference | None) -> str:
    if each is None:
        return NONE
    unit = unit_of(stored)
    text = f"{signed(each.mean, unit)} ({signed(each.low, unit)} to {signed(each.high, unit)})"
    cells = len(stored.of(each.arm, each.basis))
    return text if each.pairs == cells else f"{text}, {each.pairs} pairs"


def _both(found: Sequence[Difference | None], text: Callable[[Difference], str]) -> str:
    """Return the texts of both bases; the first alone without a difference at equal cost."""
    said = [NONE if each is None else text(each) for each in found]
    return " / ".join(said if any(one is not None for one in found[1:]) else said[:1])


def _cells_of(stored: Stored, arm: str) -> dict[str, str]:
    decimals = unit_of(stored).decimals

    def joined(text: Callable[[Sequence[Cell]], str]) -> str:
        found = [list(stored.of(arm, basis).values()) for basis in BASES]
        return " / ".join(
            text(cells) if cells else NONE for cells in (found if found[1] else found[:1])
        )

    return {
        "arm": arm,
        "seeds": joined(_seeds),
        "score (sd)": joined(lambda cells: spread([c.score for c in cells], decimals)),
        "held-out KL": joined(_divergence),
        "steps": joined(lambda cells: whole([c.steps for c in cells])),
        "CPU s": joined(lambda cells: whole([c.cpu_seconds for c in cells])),
        "teacher rows": joined(lambda cells: whole([c.teacher_rows for c in cells])),
    }


def _seeds(cells: Sequence[Cell]) -> str:
    """Return the number of cells, and how many of them are copies of the reference's."""
    same = sum(SAME_RUN in cell.details for cell in cells)
    return f"{len(cells)} ({same} same)" if same else str(len(cells))


def _divergence(cells: Sequence[Cell]) -> str:
    values = [cell.divergence for cell in cells if cell.divergence is not None]
    return spread(values, 4) if values else NONE


def spread(values: Sequence[float], decimals: int) -> str:
    """Return mean and standard deviation; a single value has no deviation."""
    mean, deviation = mean_and_deviation(values)
    text = f"{mean:.{decimals}f}"
    return f"{text} ({deviation:.{decimals}f})" if len(values) > 1 else text


def whole(values: Sequence[float]) -> str:
    """Return the mean as a whole number."""
    return f"{statistics.fmean(values):,.0f}"


def p_text(p: float) -> str:
    """Return a p-value with three decimals; a dash if it is NaN."""
    if math.isnan(p):
        return NONE
    return "<0.001" if p < 0.0005 else f"{p:.3f}"
