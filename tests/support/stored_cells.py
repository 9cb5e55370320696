"""Made-up cells of the evidence, for the tests of its statistics, gates and page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from evidence.cells import Cell, Stored, TeacherGate
from evidence.comparisons import Comparison
from evidence.run import Bench
from evidence.settings import SETTINGS

FEW = replace(SETTINGS["clinc150-few"], label_rate=2e-4, cut_label_rate=2e-4)
"""A setting whose students all learn from labels at the same rate."""
FLAT = (70.0, 78.0, 80.0, 80.2, 80.1, 80.3)
RISING = (70.0, 72.0, 74.0, 76.0, 78.0, 80.0)


@dataclass(frozen=True, kw_only=True)
class MadeUp(Comparison):
    arms: tuple[str, ...] = ("method", "best teacher", "labels", "other")
    title: str = "A made-up method"
    page: str = "pools.md"
    reference: str = "method"
    plain: str | None = "best teacher"
    labels: str | None = "labels"


def cells(arm, scores, *, basis="steps", **changes):
    """Return a cell per score, with the seeds 1, 2 and so on."""
    same = {"divergence": 0.25, "steps": 400, "cpu_seconds": 60.0, "teacher_rows": 25600}
    return tuple(
        Cell(arm=arm, seed=seed, basis=basis, score=score, **{**same, **changes})
        for seed, score in enumerate(scores, 1)
    )


def stored(*result, curve=FLAT, **changes):
    """Return stored results of cells, with one teacher."""
    teachers = (
        () if curve is None else (TeacherGate(teacher="six", seed=1, scores=curve, final=81),)
    )
    same = {
        "comparison": "madeup",
        "setting": "clinc150-few",
        "settings": "0123",
        "start": "random weights",
        "metric": "accuracy",
        "teachers": teachers,
        "cells": tuple(cell for group in result for cell in group),
    }
    return Stored(**{**same, **changes})


def example(**changes):
    """Return stored results of the made-up comparison whose gates pass."""
    return stored(
        cells("method", (80.0, 82.0, 81.0)),
        cells("best teacher", (79.0, 80.5, 80.3)),
        cells("labels", (70.0, 71.8, 71.0)),
        cells("other", (81.5, 83.7, 82.6)),
        cells("other", (80.2, 81.7, 81.1), basis="cost", steps=700),
        **changes,
    )


def one_cell(arm: str, cost: float, *, seed: int = 1, fixed: float = 0.0) -> Cell:
    """Return the cell of an arm whose training has taken this CPU time."""
    (result,) = cells(arm, (50.0,), cpu_seconds=cost, details={"fixed_cpu_seconds": fixed})
    return replace(result, seed=seed)


def stored_of(*result: Cell, comparison: str = "skdbert") -> Stored:
    """Return stored cells of a real comparison in `clinc150-few`, without teachers."""
    return stored(result, comparison=comparison, curve=None)


def bench_of(folder: Path) -> Bench:
    return Bench(data=folder / "data", out=folder / "out", encoder="some/encoder")
