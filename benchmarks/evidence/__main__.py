"""Does each method help? Every method against its controls, seed by seed, and the page of results.

`python benchmarks evidence --data ../shared/data [--only skdbert,minidisc] [--quick]`, on the
CPU, two cells side by side. Teachers and the caches of their answers are made once per setting and
seed; every cell has a folder below `--out` and is gone on with where it was. Results are stored in
notebook/evidence/ as they come, and a stored cell is not run again; `--page` draws
notebook/evidence.md from them and runs nothing. `--quick` compares knowledge selection and MiniDisc
with plain distillation and labels alone in one setting, with two seeds and at equal steps, in less
than 20 minutes. Its results and page lie below `--out`; the whole run trains none of its cells
again.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from evidence.cells import (
    BASES,
    STORED,
    Basis,
    Cell,
    Stored,
    read_stored,
    stored_path,
    with_cells,
    write_stored,
)
from evidence.collect import collect
from evidence.comparisons import COMPARISONS, group_of, named
from evidence.page import draw
from evidence.run import Bench, cached, digest, known_and_left, run_cell, taught
from evidence.settings import SETTINGS, Setting
from evidence.statistics import groups
from lib.launching import ROOT, SHARED, UnusableError, fetch_teacher
from lib.options import integers, need, parser_of, positive, words_of
from lib.tables import machine
from megakd.storage.atomic import replaced_folder

QUICK_ONLY = ("selection", "minidisc")
"""SKDBERT's four teachers and their caches take ten minutes."""
QUICK_GROUPS = ("", "T 1", "0.97")
Chosen = tuple[str, Setting, Sequence[int]]
"""A comparison, a setting and the seeds."""


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.collect is not None:
        name, folder = given.collect
        collect(given.stored / f"{name}.json", Path(folder))
    elif not given.page:
        run(given)
    draw(given.stored, given.stored.parent / "evidence.md")
    return 0


def run(given: argparse.Namespace) -> None:
    places = list(chosen(given))
    if not places:
        known = {name: ", ".join(COMPARISONS[name].seeds) for name in given.only}
        words = "; ".join(f"{name} is compared in {settings}" for name, settings in known.items())
        raise UnusableError(f"nothing to run in {', '.join(given.settings)}: {words}")
    begun = [(_opened(given.stored, name, setting), seeds) for name, setting, seeds in places]
    need(given.data / file for _, setting, _ in places for file in setting.needs)
    out = given.out.resolve()
    encoder = out / "encoder"
    if not encoder.is_dir():
        with replaced_folder(encoder) as folder:
            shutil.copytree(fetch_teacher(), folder, dirs_exist_ok=True)
    bench = Bench(data=given.data.resolve(), out=out, encoder=str(encoder))
    for setting in {setting.name: setting for _, setting, _ in places}.values():
        setting.write_splits(bench.data, bench.folder(setting) / "data")
    for stored, seeds in begun:
        run_comparison(given, bench, stored, seeds)


def chosen(given: argparse.Namespace) -> Iterator[Chosen]:
    for name in given.only:
        for setting, seeds in COMPARISONS[name].seeds.items():
            if setting in given.settings:
                yield name, SETTINGS[setting], given.seeds or seeds


def _opened(folder: Path, name: str, setting: Setting) -> Stored:
    import torch
    import transformers

    import megakd

    settings = digest(name, setting)
    path = stored_path(folder, name, setting.name)
    if path.is_file():
        return read_stored(path, settings=settings)
    libraries = {module.__name__: module.__version__ for module in (megakd, torch, transformers)}
    return Stored(
        comparison=name,
        setting=setting.name,
        settings=settings,
        start=COMPARISONS[name].start,
        metric="accuracy",
        machine=machine(),
        versions={"python": platform.python_version(), **libraries},
    )


def run_comparison(
    given: argparse.Namespace, bench: Bench, stored: Stored, seeds: Sequence[int]
) -> None:
    """Run the arms of the gates, the other arms at equal steps, and all arms at equal cost.

    The steps at equal cost come from the measured costs of all seeds.
    """
    comparison = COMPARISONS[stored.comparison]
    first = (comparison.reference, comparison.plain, comparison.labels)
    chosen = [
        arm
        for arm in comparison.arms_in(stored.setting)
        if not given.quick or (group_of(arm) in QUICK_GROUPS and named(arm) in first)
    ]
    gating = [arm for arm in chosen if named(arm) in (comparison.plain, comparison.labels)]
    stored = _run_seeds(given, bench, stored, seeds, gating, "steps")
    arms = _compared(stored, chosen) if len(seeds) > 1 else chosen
    for basis in BASES[:1] if given.quick else BASES:
        stored = _run_seeds(given, bench, stored, seeds, arms, basis)


def _compared(stored: Stored, arms: Sequence[str]) -> list[str]:
    """Return the arms without those of groups that fail a gate, which are not compared."""
    comparison, failed = COMPARISONS[stored.comparison], set[str]()
    for group in groups(stored, comparison):
        if not group.is_compared:
            failed.add(group.reference)
            reasons = "; ".join(gate.says for gate in group.gates if gate.state == "failed")
            words = f"no run of {group.reference} and its controls"
            print(f"{stored.setting} {words}, because a gate has failed: {reasons}", flush=True)
    present = stored.arms()
    return [arm for arm in arms if comparison.reference_of(arm, present) not in failed]


def _run_seeds(
    given: argparse.Namespace,
    bench: Bench,
    stored: Stored,
    seeds: Sequence[int],
    arms: Sequence[str],
    basis: Basis,
) -> Stored:
    """Train the teachers, then run the cells of all seeds.

    An arm that needs the result of another arm comes after it.
    """
    setting, comparison = SETTINGS[stored.setting], COMPARISONS[stored.comparison]
    _, left = known_and_left(bench, stored, seeds, arms, basis)
    again = sorted({run.seed for run in left})
    needed = [(name, seed) for seed in again for name in comparison.teachers]
    # The longest runs come first, so that no core waits for the last run.
    needed.sort(key=lambda one: setting.pool[one[0]], reverse=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        gates = list(pool.map(lambda one: taught(bench, setting, *one), needed))
        if comparison.cached:
            list(pool.map(lambda seed: cached(bench, setting, comparison.teachers, seed), again))
    others = [gate for gate in stored.teachers if gate.seed not in again]
    stored = dataclasses.replace(stored, teachers=(*others, *gates))
    for is_after in (False, True):
        now = [arm for arm in arms if (comparison.arms[arm].after is not None) is is_after]
        stored = _run_arms(given, bench, stored, seeds, now, basis)
    return stored


def _run_arms(
    given: argparse.Namespace,
    bench: Bench,
    stored: Stored,
    seeds: Sequence[int],
    arms: Sequence[str],
    basis: Basis,
) -> Stored:
    comparison = COMPARISONS[stored.comparison]
    known, left = known_and_left(bench, stored, seeds, arms, basis)
    if known:
        stored = with_cells(stored, known)
        write_stored(given.stored, stored)
    # The longest runs come first, as with the teachers.
    costs = {arm: [c.cpu_seconds for c in stored.of(arm).values()] for arm in arms}
    left.sort(key=lambda run: max(costs[run.name], default=0.0), reverse=True)
    failures = list[BaseException]()
    with ThreadPoolExecutor(given.jobs) as pool:
        waiting = [pool.submit(run_cell, bench, comparison, cell) for cell in left]
        for done in as_completed(waiting):
            # A cell that fails does not keep the others from being stored.
            if error := done.exception():
                failures.append(error)
                print(f"evidence: {error}; the other runs go on", file=sys.stderr, flush=True)
                continue
            cell = dataclasses.replace(done.result(), basis=basis)
            stored = with_cells(stored, [cell])
            write_stored(given.stored, stored)
            print(f"{stored.setting} {line(cell)}", flush=True)
    if failures:
        raise failures[0]
    return stored


def line(cell: Cell) -> str:
    divergence = "-" if cell.divergence is None else f"{cell.divergence:.4f}"
    return (
        f"{cell.arm} seed {cell.seed}, equal {cell.basis}: {cell.score:.2f}, KL {divergence}, "
        f"{cell.steps} steps, {cell.cpu_seconds:.0f} s"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, default=ROOT / SHARED)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench/evidence")
    parser.add_argument("--stored", type=Path, help="results; benchmarks/notebook/evidence")
    words = f"comparisons; default: all, with --quick {','.join(QUICK_ONLY)}"
    parser.add_argument("--only", type=words_of(COMPARISONS), help=words)
    planned = [name for name, setting in SETTINGS.items() if setting.in_plan]
    words = f"of {', '.join(SETTINGS)}; default: {', '.join(planned)}"
    parser.add_argument("--settings", type=words_of(SETTINGS), default=planned, help=words)
    parser.add_argument("--seeds", type=integers, help="separated by commas")
    parser.add_argument("--jobs", type=positive, default=2, help="cells side by side")
    parser.add_argument("--quick", action="store_true", help="a subset of less than 20 minutes")
    words = "store the runs of another benchmark, such as shrink-books runs/bench/shrink/books"
    parser.add_argument("--collect", nargs=2, metavar=("CELLS", "FOLDER"), help=words)
    parser.add_argument("--page", action="store_true", help="draw the page and run nothing")
    given = parser.parse_args(arguments)
    given.only = given.only or list(QUICK_ONLY if given.quick else COMPARISONS)
    if given.quick:
        given.settings = ["clinc150-few"]
        given.seeds = given.seeds or [1, 2]
    given.stored = given.stored or (given.out / "quick/evidence" if given.quick else STORED)
    return given
