"""Runs of a benchmark, each in a folder of its own: gone on with where it was, done once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from launching import ROOT, trained, write_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path


class Leg(NamedTuple):
    """One run: its YAML file, the folder it writes, and what wins over the file."""

    name: str
    config: Path
    output: Path
    overrides: tuple[str, ...]


def report_of(leg: Leg, *, ranks: int, jobs: int = 1) -> dict[str, Any]:
    """The report of a leg, one of `jobs` side by side: it is done, gone on with, or started."""
    report = finished(leg)
    if report is None:
        print(f"{leg.output}:", flush=True)
        report = trained(leg.config, leg.output, ranks=ranks, overrides=leg.overrides, jobs=jobs)
    return report


def write_leg_configs(out: Path, trees: Mapping[str, Any]) -> None:
    """Write the configs that legs of a folder override, by name."""
    for name, tree in trees.items():
        write_config(out / "configs" / f"{name}.yaml", {"output_dir": str(out / name), **tree})


def leg_of(out: Path, name: str, config: str, overrides: Iterable[str]) -> Leg:
    """Return the leg of a folder that overrides one of its configs."""
    return Leg(name, out / "configs" / f"{config}.yaml", out / name, tuple(overrides))


def task_legs_of(
    out: Path,
    models: Mapping[str, Path],
    tasks: Sequence[str],
    *,
    seed: int,
    overrides: Sequence[str] = (),
) -> list[Leg]:
    """Return a leg per model and task, which overrides the config `task-<task>`."""
    return [
        leg_of(
            out,
            f"{task}-{name}-{seed}",
            f"task-{task}",
            (f"student.model={folder}", f"seed={seed}", *overrides),
        )
        for name, folder in models.items()
        for task in tasks
    ]


def run_side_by_side(some: Iterable[Leg], *, jobs: int) -> None:
    """Run legs of one rank each, `jobs` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda leg: report_of(leg, ranks=1, jobs=jobs), some))


def reports_of(some: Iterable[Leg]) -> dict[str, dict[str, Any] | None]:
    """Return the reports of legs by name, and print which legs have not finished."""
    reports = {leg.name: finished(leg) for leg in some}
    for name, report in reports.items():
        if report is None:
            print(f"{name} has not finished", flush=True)
    return reports


def finished(leg: Leg) -> dict[str, Any] | None:
    """The report of a leg that is done.

    Raises:
        MegakdError: the folder holds a run of other settings.
    """
    from megakd.config.file import load_config
    from megakd.run.finished_run import is_finished

    output = ROOT / leg.output
    config = load_config(ROOT / leg.config, [*leg.overrides, f"output_dir={output}"])
    if not is_finished(config):
        return None
    return json.loads((output / "report.json").read_text(encoding="utf-8"))
