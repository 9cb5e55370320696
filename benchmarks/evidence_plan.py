"""The plan of the evidence: which cells of a comparison are known, and which runs are left."""

from __future__ import annotations

import dataclasses
from itertools import product
from statistics import median
from typing import TYPE_CHECKING

from evidence_cells import SAME_RUN, Basis, Cell, Stored
from evidence_comparisons import COMPARISONS
from evidence_run import Bench, Planned, place_of
from evidence_settings import SETTINGS
from summary import SAME_COST

if TYPE_CHECKING:
    from collections.abc import Sequence


def known_and_left(
    bench: Bench, stored: Stored, seeds: Sequence[int], arms: Sequence[str], basis: Basis
) -> tuple[list[Cell], list[Planned]]:
    """Return the cells that need no run, and the runs that are left."""
    known, left = list[Cell](), list[Planned]()
    for seed, arm in product(seeds, arms):
        if copy := copied(stored, arm, seed, basis):
            known.append(copy)
        elif run := planned(bench, stored, arm, seed, basis):
            done = stored_run(stored, run)
            if done is None:
                left.append(run)
            else:
                known.append(done)
    return known, left


def copied(stored: Stored, arm: str, seed: int, basis: Basis) -> Cell | None:
    """Return the cell of an arm whose run would be that of another arm; None for other arms."""
    found = COMPARISONS[stored.comparison].arms[arm]
    cell = None if found.after is None else stored.of(found.after).get(seed)
    if cell is None or found.same_as is None:
        return None
    details = {**cell.details, SAME_RUN: 1.0}
    is_same = found.same_as(cell.details)
    return dataclasses.replace(cell, arm=arm, basis=basis, details=details) if is_same else None


def stored_run(stored: Stored, run: Planned) -> Cell | None:
    """Return the stored cell of a run; None if the run is still to be made.

    Runs of an arm and a seed differ in their steps alone, so that one run may serve both bases.
    """
    steps, cost = stored.of(run.name), stored.of(run.name, "cost")
    for cell in (steps.get(run.seed), cost.get(run.seed)):
        if cell is not None and cell.max_steps == run.steps:
            return dataclasses.replace(cell, basis=run.basis)
    return None


def planned(bench: Bench, stored: Stored, arm: str, seed: int, basis: Basis) -> Planned | None:
    """Return the cell of an arm and seed; None where an equal cost is not possible.

    A cell at equal cost has as many steps as make the training as long as that of the reference
    arm (see `cost_share`). What is trained before the student, such as a selector, is paid first.
    The reference arm itself has no such cell.
    """
    setting, comparison = SETTINGS[stored.setting], COMPARISONS[stored.comparison]
    steps = round(setting.student.steps * comparison.arms[arm].steps)
    if basis == "cost":
        share = cost_share(stored, arm, comparison.reference_of(arm, stored.arms()))
        if share is None or not comparison.arms[arm].at_equal_cost:
            return None
        # With a share of 1, the cell at equal steps is the cell at equal cost (see `stored_run`).
        steps = max(2, round(share * steps))
    name = f"{arm}-{seed}-{basis}".replace(", ", "-").replace(" ", "_")
    return Planned(
        name=arm,
        seed=seed,
        basis=basis,
        steps=steps,
        place=place_of(
            bench, setting, seed, {a: stored.of(a)[seed].details for a in _with_seed(stored, seed)}
        ),
        folder=bench.folder(setting) / stored.comparison / name,
    )


def _with_seed(stored: Stored, seed: int) -> list[str]:
    return [arm for arm in stored.arms() if seed in stored.of(arm)]


def cost_share(stored: Stored, arm: str, reference: str) -> float | None:
    """Return the share of an arm's steps that costs as much as the reference arm.

    The median over all seeds, because the CPU time of the same training differs by a tenth from run
    to run on a machine with other work. None for the reference arm, and for an arm that costs too
    much before the student's first step. 1 for an arm of nearly the same cost.
    """
    ours, theirs = stored.of(arm), stored.of(reference)
    seeds = ours.keys() & theirs.keys()
    if arm == reference or not seeds:
        return None
    ratios, shares = list[float](), list[float]()
    for seed in seeds:
        cost, aim = ours[seed].cpu_seconds, theirs[seed].cpu_seconds
        fixed = ours[seed].details.get("fixed_cpu_seconds", 0.0)
        ratios.append(cost / aim)
        shares.append((aim - fixed) / (cost - fixed))
    if abs(median(ratios) - 1) < SAME_COST:
        return 1.0
    share = median(shares)
    return share if share > SAME_COST else None
