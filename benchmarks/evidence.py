"""Does each method help? Every method against its controls, seed by seed, and the page of results.

`python benchmarks/evidence.py --data ../shared/data [--only skdbert,minidisc] [--quick]`, on the
CPU, two cells side by side. Teachers and the caches of their answers are made once per setting and
seed; every cell has a folder below `--out` and is gone on with where it was. Results are stored in
docs/evidence/ as they come, and a stored cell is not run again; `--page` draws docs/evidence.md
from them and runs nothing. `--collect` stores the finished runs of the benchmarks that train their
arms themselves, such as `shrink.py`, and draws the page. `--quick` compares knowledge selection and
MiniDisc with plain distillation and labels alone in one setting, with two seeds and at equal steps,
in less than 20 minutes. Its results and page lie below `--out`; the whole run trains none of its
cells again.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from evidence_arms import group_of, named
from evidence_cells import (
    BASES,
    SAME_RUN,
    STORED,
    Basis,
    Cell,
    Stored,
    StoredCellError,
    read_stored,
    stored_path,
    with_cells,
    write_stored,
)
from evidence_checks import UnusableError, check_data, check_groups, check_space
from evidence_comparisons import COMPARISONS
from evidence_legs import collect
from evidence_others import COLLECTED
from evidence_page import draw
from evidence_run import Bench, Planned, cached, digest, place_of, run_cell, taught
from evidence_settings import SETTINGS, Setting
from launching import ROOT, SHARED, RunFailedError, fetch_teacher
from machine import machine
from options import integers, words_of
from summary import SAME_COST

from megakd.errors import MegakdError
from megakd.storage.atomic import replaced_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

QUICK_SETTING, QUICK_SEEDS = "clinc150-few", (1, 2)
QUICK_ONLY = ("selection", "minidisc")
"""SKDBERT's four teachers and their caches take ten minutes."""
QUICK_GROUPS = ("", "T 1", "0.97")
"""Of arms; those without a group, too."""


def main(arguments: Sequence[str]) -> int:
    """Run what has not finished, store it, and draw the page."""
    given = parse(arguments)
    try:
        if given.collect:
            collect(given.stored, given.data, given.collect)
        elif not given.page:
            run(given)
        draw(given.stored, given.stored.parent / "evidence.md")
    except (UnusableError, StoredCellError, RunFailedError, MegakdError) as error:
        print(f"evidence: error: {error}", file=sys.stderr)
        return 1
    return 0


def run(given: argparse.Namespace) -> None:
    """Run the chosen comparisons in their settings."""
    places = list(chosen(given))
    check_groups(given.groups, places)
    check_data(given.data, [setting for _, setting, _ in places])
    check_space(given.out, places, given.jobs)
    bench = Bench(
        data=given.data.resolve(),
        out=given.out.resolve(),
        encoder=str(encoder_in(given.out.resolve())),
    )
    for setting in {setting.name: setting for _, setting, _ in places}.values():
        setting.write_splits(bench.data, bench.folder(setting) / "data")
    for name, setting, seeds in places:
        run_comparison(given, bench, _opened(given.stored, name, setting), seeds)


def encoder_in(out: Path) -> Path:
    """Return the folder of the pretrained encoder, which is copied next to the runs."""
    found = out / "encoder"
    if not found.is_dir():
        with replaced_folder(found) as folder:
            shutil.copytree(ROOT / fetch_teacher(), folder, dirs_exist_ok=True)
    return found


def chosen(given: argparse.Namespace) -> Iterator[tuple[str, Setting, Sequence[int]]]:
    """Yield the comparisons, settings and seeds that were asked for."""
    for name in given.only:
        for setting, seeds in COMPARISONS[name].seeds.items():
            if setting in given.settings:
                yield name, SETTINGS[setting], given.seeds or seeds


def _opened(folder: Path, name: str, setting: Setting) -> Stored:
    """Return what is stored of a comparison in a setting, or a new record."""
    settings, found = digest(name, setting), COMPARISONS[name]
    path = stored_path(folder, name, setting.name)
    if path.is_file():
        return read_stored(path, settings=settings)
    return Stored(
        comparison=name,
        setting=setting.name,
        settings=settings,
        start=found.start,
        metric="accuracy",
        machine=machine(),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    import torch
    import transformers

    import megakd

    found = {module.__name__: module.__version__ for module in (megakd, torch, transformers)}
    return {"python": platform.python_version(), **found}


def run_comparison(
    given: argparse.Namespace, bench: Bench, stored: Stored, seeds: Sequence[int]
) -> None:
    """Run all cells at equal steps, and then, by their measured costs, all cells at equal cost."""
    for basis in BASES[:1] if given.quick else BASES:
        arms = _chosen_arms(given, stored)
        left = [seed for seed in seeds if known_and_left(bench, stored, seed, arms, basis)[1]]
        stored = _with_teachers(given, bench, stored, left)
        for seed in seeds:
            stored = _run_seed(given, bench, stored, seed, basis)


def _chosen_arms(given: argparse.Namespace, stored: Stored) -> list[str]:
    found = COMPARISONS[stored.comparison]
    first = (found.reference, found.plain, found.labels)
    return [
        arm
        for arm in found.arms_in(stored.setting)
        if (given.groups is None or group_of(arm) in given.groups)
        and (named(arm) in first or not given.quick)
    ]


def _with_teachers(
    given: argparse.Namespace, bench: Bench, stored: Stored, seeds: Sequence[int]
) -> Stored:
    """Train the teachers of the seeds and write their caches, unless that is done."""
    setting, comparison = SETTINGS[stored.setting], COMPARISONS[stored.comparison]
    needed = [(name, seed) for seed in seeds for name in comparison.teachers]
    # The longest runs come first, so that no core waits for the last run.
    needed.sort(key=lambda one: setting.pool[one[0]], reverse=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        gates = list(pool.map(lambda one: taught(bench, setting, *one), needed))
        if comparison.cached:
            list(pool.map(lambda seed: cached(bench, setting, comparison.teachers, seed), seeds))
    others = [gate for gate in stored.teachers if gate.seed not in seeds]
    return dataclasses.replace(stored, teachers=(*others, *gates))


def _run_seed(
    given: argparse.Namespace, bench: Bench, stored: Stored, seed: int, basis: Basis
) -> Stored:
    """Run the cells of a seed; an arm that needs the result of another arm comes after it."""
    found, chosen = COMPARISONS[stored.comparison].arms, _chosen_arms(given, stored)
    for is_after in (False, True):
        arms = [arm for arm in chosen if (found[arm].after is not None) is is_after]
        stored = _run_arms(given, bench, stored, seed, arms, basis)
    return stored


def _run_arms(
    given: argparse.Namespace,
    bench: Bench,
    stored: Stored,
    seed: int,
    arms: Sequence[str],
    basis: Basis,
) -> Stored:
    comparison = COMPARISONS[stored.comparison]
    known, left = known_and_left(bench, stored, seed, arms, basis)
    if known:
        stored = with_cells(stored, known)
        write_stored(given.stored, stored)
    # The longest runs come first, as with the teachers.
    left.sort(key=lambda run: _known_cost(stored, run.name), reverse=True)
    failures = list[BaseException]()
    with ThreadPoolExecutor(given.jobs) as pool:
        waiting = [pool.submit(run_cell, bench, comparison, cell) for cell in left]
        for done in as_completed(waiting):
            # A cell that fails does not keep the others from being stored.
            if error := done.exception():
                failures.append(error)
                continue
            cell = dataclasses.replace(done.result(), basis=basis)
            stored = with_cells(stored, [cell])
            write_stored(given.stored, stored)
            print(f"{stored.setting} {line(cell)}", flush=True)
    if failures:
        raise failures[0]
    return stored


def _known_cost(stored: Stored, arm: str) -> float:
    return max((cell.cpu_seconds for cell in stored.of(arm).values()), default=0.0)


def known_and_left(
    bench: Bench, stored: Stored, seed: int, arms: Sequence[str], basis: Basis
) -> tuple[list[Cell], list[Planned]]:
    """Return the cells that need no run, and the runs that are left."""
    known, left = list[Cell](), list[Planned]()
    for arm in arms:
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


def line(cell: Cell) -> str:
    """Return a cell as one line."""
    divergence = "-" if cell.divergence is None else f"{cell.divergence:.4f}"
    return (
        f"{cell.arm} seed {cell.seed}, equal {cell.basis}: {cell.score:.2f}, KL {divergence}, "
        f"{cell.steps} steps, {cell.cpu_seconds:.0f} s"
    )


def planned(bench: Bench, stored: Stored, arm: str, seed: int, basis: Basis) -> Planned | None:
    """Return the cell of an arm and seed; None where an equal cost is not possible.

    A cell at equal cost has as many steps as make the training as long as that of the reference
    arm (see `cost_share`). What is trained before the student, such as a selector, is paid first.
    The reference arm itself has no such cell.
    """
    setting, comparison = SETTINGS[stored.setting], COMPARISONS[stored.comparison]
    steps = round(setting.student.steps * comparison.arms[arm].steps)
    if basis == "cost":
        share = cost_share(stored, arm, comparison.reference_of(arm))
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


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, default=ROOT / SHARED)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench/evidence")
    parser.add_argument("--stored", type=Path, help="folder of the results; docs/evidence")
    words = f"comparisons; default: all, with --quick {','.join(QUICK_ONLY)}"
    parser.add_argument("--only", type=words_of(COMPARISONS), help=words)
    parser.add_argument("--settings", type=words_of(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=integers, help="separated by commas")
    groups = sorted({group_of(arm) for found in COMPARISONS.values() for arm in found.arms})
    words = "of arms, such as 0.97; default: all"
    parser.add_argument("--groups", type=words_of(groups), help=words)
    parser.add_argument("--jobs", type=int, default=2, help="cells side by side")
    parser.add_argument("--quick", action="store_true", help="a subset of less than 20 minutes")
    collected = {"nargs": "?", "const": list(COLLECTED), "type": words_of(COLLECTED)}
    words = "store the finished runs of other benchmarks and run nothing; default: all of them"
    parser.add_argument("--collect", **collected, help=words)
    parser.add_argument("--page", action="store_true", help="draw the page and run nothing")
    given = parser.parse_args(arguments)
    given.only = given.only or list(QUICK_ONLY if given.quick else COMPARISONS)
    if given.quick:
        given.settings = [QUICK_SETTING]
        given.seeds = given.seeds or list(QUICK_SEEDS)
        given.groups = given.groups or list(QUICK_GROUPS)
    given.stored = given.stored or (given.out / "quick/evidence" if given.quick else STORED)
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
