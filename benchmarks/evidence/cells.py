"""Stored results of the evidence: a file per comparison and setting, with its gates and cells.

A cell is one run of one arm of a comparison with one seed. The files lie in notebook/evidence/; the
page notebook/evidence.md is drawn from them alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lib.launching import ROOT, UnusableError
from megakd.storage.atomic import write_text

VERSION = 1
"""Of what a cell means: which split is scored, what counts as cost, how teachers are trained."""
STORED = ROOT / "benchmarks/notebook/evidence"

SAME_RUN = "same_run"
"""Detail of a cell that is a copy: the run would be the run of the reference arm."""

Basis = Literal["steps", "cost"]
"""What an arm has in common with the reference arm: the student's steps, or the total cost."""
BASES: tuple[Basis, ...] = ("steps", "cost")


class StoredCellError(UnusableError):
    """Stored cells are damaged, or belong to another version or setting."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The result of one run.

    arm: of the comparison. seed: of data order, student and teachers alike.
    score: main metric on the test rows; points, or nats per token where less is better.
    divergence: KL(reference teacher || student) on the test rows, in nats per row or token; None
        where no reference teacher exists.
    steps: of the student and its trials; of MaxiDisc, of all its legs and students.
    max_steps: `train.max_steps` of the run; None for runs of other benchmarks.
    cpu_seconds: of all training of the run, also of trials, selectors and pilots, without the
        teachers that exist before. teacher_rows: rows that teachers have answered, once each.
    details: numbers of the arm, such as the mean weights of a selector.
    """

    arm: str
    seed: int
    basis: Basis
    score: float
    divergence: float | None
    steps: int
    cpu_seconds: float
    teacher_rows: int
    max_steps: int | None = None
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TeacherGate:
    """Validation scores of one teacher during its training, in points.

    final: score on the test rows, as that of a cell.
    """

    teacher: str
    seed: int
    scores: tuple[float, ...]
    final: float


@dataclass(frozen=True, kw_only=True)
class Stored:
    """All that is stored of one comparison in one setting.

    settings: digest of the definitions of the setting and the comparison.
    start: how the student is initialised, such as "layers of the pretrained encoder".
    lower_is_better: whether a smaller score is the better score.
    """

    comparison: str
    setting: str
    settings: str
    start: str
    metric: str
    lower_is_better: bool = False
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    teachers: tuple[TeacherGate, ...] = ()
    cells: tuple[Cell, ...] = ()

    def of(self, arm: str, basis: Basis = "steps") -> dict[int, Cell]:
        return {c.seed: c for c in self.cells if c.arm == arm and c.basis == basis}

    def arms(self, basis: Basis = "steps") -> list[str]:
        return list(dict.fromkeys(cell.arm for cell in self.cells if cell.basis == basis))

    def runs(self) -> list[Cell]:
        """Return a cell per run: a run may serve both bases, and a copy is no run."""
        made = (cell for cell in self.cells if not cell.details.get(SAME_RUN))
        return list({(cell.arm, cell.seed, cell.steps): cell for cell in made}.values())


def stored_path(folder: Path, comparison: str, setting: str) -> Path:
    return folder / f"{comparison}-{setting}.json"


def write_stored(folder: Path, stored: Stored) -> Path:
    path = stored_path(folder, stored.comparison, stored.setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {"version": VERSION, **dataclasses.asdict(stored)}
    write_text(path, json.dumps(tree, indent=1) + "\n")
    return path


def read_stored(path: Path, *, settings: str | None = None) -> Stored:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        version = tree.pop("version")
        if version != VERSION:
            raise StoredCellError(
                f"{path}: version {version} of the cells, this program reads and writes version "
                f"{VERSION}; move the file away and run the comparison again"
            )
        stored = _stored(tree)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoredCellError(f"{path}: no stored cells ({error!r})") from error
    if settings is not None and stored.settings != settings:
        raise StoredCellError(
            f"{path}: the cells of {stored.comparison} in the setting {stored.setting} belong to "
            f"the settings {stored.settings}, this program has {settings}; move the file away and "
            "run the comparison again"
        )
    return stored


def _stored(tree: Mapping[str, Any]) -> Stored:
    teachers = (TeacherGate(**row | {"scores": tuple(row["scores"])}) for row in tree["teachers"])
    cells = tuple(Cell(**row) for row in tree["cells"])
    for cell in cells:
        if not (math.isfinite(cell.score) and math.isfinite(cell.cpu_seconds)):
            raise ValueError(f"{cell.arm}, seed {cell.seed}: score or time is not finite")
    return Stored(**{**tree, "teachers": tuple(teachers), "cells": cells})


def with_cells(stored: Stored, cells: Iterable[Cell]) -> Stored:
    """Return the stored results with further cells; a cell replaces that of its arm and seed."""
    by_run = {(cell.basis, cell.arm, cell.seed): cell for cell in (*stored.cells, *cells)}
    return dataclasses.replace(stored, cells=tuple(by_run.values()))


def paired(
    stored: Stored, arm: str, reference: str, *, basis: Basis, value: str = "score"
) -> Sequence[float]:
    """Return the differences of an arm from the reference arm, by seed; positive if it is better.

    The reference arm always has the basis `steps`.
    """
    ours, theirs = stored.of(arm, basis), stored.of(reference)
    less = stored.lower_is_better or value == "divergence"
    pairs = (
        (getattr(ours[seed], value), getattr(theirs[seed], value))
        for seed in sorted(ours.keys() & theirs.keys())
    )
    both = [(mine, other) for mine, other in pairs if mine is not None and other is not None]
    return [other - mine if less else mine - other for mine, other in both]
