"""Does each method help? Every method against its controls, seed by seed.

`python benchmarks evidence --data ../shared/data [--only skdbert,minidisc] [--quick]`, on the
CPU, two runs side by side. Each arm learns at equal steps, and then for as many steps as cost the
same CPU time as the reference arm. Teachers and the caches of their answers are made once per
setting and seed; every run has a folder below `--out`, is gone on with where it was, and is done
once. `OUT/results/COMPARISON-SETTING.json` is written after every run, and a table is printed at
the end: means over the seeds, and paired differences from the reference arm.

`--quick` compares knowledge selection and MiniDisc with plain distillation and labels alone in one
setting, with two seeds and at equal steps, in less than 20 minutes; its results are in `OUT/quick`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from evidence.comparisons import COMPARISONS, Comparison
from evidence.run import Basis, Bench, Cell, Cells, cached, planned, run_cell, taught
from evidence.settings import PLANNED, POOL, SETTINGS
from evidence.table import table
from lib.launching import ROOT, SHARED, UnusableError, fetch_teacher
from lib.options import integers, need, parser_of, positive, words_of
from lib.tables import machine
from megakd.process.files import replaced_folder, write_text

BASES: tuple[Basis, ...] = ("steps", "cost")


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    places = [(n, s) for n in given.only for s in COMPARISONS[n].seeds if s in given.settings]
    if not places:
        known = "; ".join(
            f"{n} is compared in {', '.join(COMPARISONS[n].seeds)}" for n in given.only
        )
        raise UnusableError(f"nothing to run in {', '.join(given.settings)}: {known}")
    need(given.data / file for _, setting in places for file in SETTINGS[setting].needs)
    encoder = given.out / "encoder"
    if not encoder.is_dir():
        with replaced_folder(encoder) as folder:
            shutil.copytree(fetch_teacher(), folder, dirs_exist_ok=True)
    for name, setting in places:
        bench = Bench(setting=SETTINGS[setting], folder=given.out / setting, encoder=str(encoder))
        bench.setting.write_splits(given.data, bench.data)
        run_comparison(given, bench, name, given.seeds or COMPARISONS[name].seeds[setting])
    return 0


def run_comparison(
    given: argparse.Namespace, bench: Bench, name: str, seeds: Sequence[int]
) -> None:
    """Train the teachers, then all arms at equal steps, then all arms at equal cost.

    The steps at equal cost come from the measured costs of all seeds.
    """
    comparison = COMPARISONS[name]
    results = given.out / ("quick" if given.quick else "results")
    path = results / f"{name}-{bench.setting.name}.json"
    # The longest runs come first, so that no core waits for the last run.
    teachers = sorted(comparison.teachers, key=POOL.__getitem__, reverse=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        pairs = [(teacher, seed) for teacher in teachers for seed in seeds]
        facts = facts_of(name, bench, list(pool.map(lambda pair: taught(bench, *pair), pairs)))
        if comparison.cached:
            list(pool.map(lambda seed: cached(bench, comparison.teachers, seed), seeds))
    arms = comparison.quick if given.quick else tuple(comparison.arms)
    bases = BASES[:1] if given.quick else BASES
    cells = dict[tuple[str, int, Basis], Cell]()
    for basis in bases:
        for is_after in (False, True):
            some = [arm for arm in arms if (comparison.arms[arm].after is not None) is is_after]
            keys = [(arm, seed, basis) for arm in some for seed in seeds]
            for cell in run_cells(given.jobs, bench, comparison, cells, keys):
                cells[cell.arm, cell.seed, basis] = cell
                rows = [dataclasses.asdict(one) for one in cells.values()]
                write_text(path, json.dumps({**facts, "cells": rows}, indent=1) + "\n")
    for basis in bases:
        print(f"\n{name} in {bench.setting.name}, equal {basis}:")
        print(table(comparison, cells, basis), flush=True)
    print(f"results: {path}", flush=True)


def run_cells(
    jobs: int,
    bench: Bench,
    comparison: Comparison,
    cells: Cells,
    keys: Sequence[tuple[str, int, Basis]],
) -> Iterator[Cell]:
    """Yield the cells as they end; a cell that fails is raised after all others have ended."""
    runs = [run for key in keys if (run := planned(bench, comparison, cells, key))]
    failures = list[BaseException]()
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(run_cell, bench, run) for run in runs]):
            if error := done.exception():
                failures.append(error)
                print(f"evidence: {error}; the other runs go on", file=sys.stderr, flush=True)
                continue
            cell = done.result()
            print(
                f"{bench.setting.name}: {cell.arm}, seed {cell.seed}, equal {cell.basis}: "
                f"{cell.score:.2f}, {cell.steps} steps, {cell.cpu_seconds:.0f} s",
                flush=True,
            )
            yield cell
    if failures:
        raise failures[0]


def facts_of(comparison: str, bench: Bench, teachers: Sequence[Any]) -> dict[str, Any]:
    import torch
    import transformers

    import megakd

    libraries = {module.__name__: module.__version__ for module in (megakd, torch, transformers)}
    return {
        "comparison": comparison,
        "setting": bench.setting.name,
        "machine": machine(),
        "versions": {"python": platform.python_version(), **libraries},
        "teachers": teachers,
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    quick = [name for name, comparison in COMPARISONS.items() if comparison.quick]
    parser.add_argument("--data", type=Path, default=ROOT / SHARED)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench/evidence")
    words = f"comparisons; default: all, with --quick {','.join(quick)}"
    parser.add_argument("--only", type=words_of(COMPARISONS), help=words)
    words = f"of {', '.join(SETTINGS)}; default: {', '.join(PLANNED)}"
    parser.add_argument("--settings", type=words_of(SETTINGS), default=PLANNED, help=words)
    parser.add_argument("--seeds", type=integers, help="separated by commas")
    parser.add_argument("--jobs", type=positive, default=2, help="runs side by side")
    parser.add_argument("--quick", action="store_true", help="a subset of less than 20 minutes")
    given = parser.parse_args(arguments)
    given.data, given.out = given.data.resolve(), given.out.resolve()
    given.only = given.only or (quick if given.quick else list(COMPARISONS))
    if given.quick:
        given.settings, given.seeds = ["clinc150-few"], given.seeds or [1, 2]
        given.only = [name for name in given.only if COMPARISONS[name].quick]
    return given
