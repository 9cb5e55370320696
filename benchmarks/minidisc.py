"""MiniDisc against MaxiDisc and no assistant: does one trial choose well, and what does it cost?

`python benchmarks/minidisc.py [pydocs clinc150 sst2] [--seeds 1,2,3] [--teacher FOLDER]
[--set key=value]`, on two CPU ranks under DeepSpeed's launcher. For every task and seed a teacher
learns the task, then three legs distil it on the same grid with the same number of steps:

* minidisc: all assistants in one trial, the chosen one teaches the student;
* maxidisc: every assistant is trained, and a student through each;
* direct: the student without an assistant.

Each leg has a folder, runs/bench/minidisc/<task>/<leg>-seed-<n>, is gone on with where it was, and
is not started again once it has finished; a leg of other settings in its place is refused.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launching import ROOT, SHARED, write_config
from legs import Leg, report_of
from machine import print_row
from minidisc_cases import CASES, prepared_task, schedule_config, teacher_config
from minidisc_summary import Outcome, outcome, rows, table, verdict
from options import fractions, integers

if TYPE_CHECKING:
    from collections.abc import Sequence

METHODS = ("minidisc", "maxidisc", "direct")


def main(arguments: Sequence[str]) -> int:
    """Runs what has not finished, and prints all tasks and seeds."""
    given = parse(arguments)
    missing = [path for path in needed(given) if not (ROOT / path).exists()]
    if missing:
        print(f"minidisc: error: {missing[0]} does not exist", file=sys.stderr)
        return 1
    outcomes: list[Outcome] = []
    for task in given.tasks:
        folder = given.output / "minidisc" / task
        write_configs(folder, task, given)
        for seed in given.seeds:
            reports = {
                leg.name: report_of(leg, ranks=given.ranks) for leg in legs(folder, seed, given)
            }
            reports.pop("teacher")
            outcomes.append(outcome(task, seed, reports))
            print(table(outcomes), flush=True)
    print(verdict(outcomes))
    command = shlex.join(["python", "benchmarks/minidisc.py", *arguments])
    what = f"teacher {given.teacher}, grid {given.grid}, {given.steps} steps, {given.ranks} rank(s)"
    print_row("\n".join(rows(outcomes, command, what)))
    return 0


def needed(given: argparse.Namespace) -> list[Path]:
    """The real data that the tasks read."""
    found = [CASES[task].data for task in given.tasks]
    return [given.data / path for path in found if path is not None]


def write_configs(folder: Path, task: str, given: argparse.Namespace) -> None:
    """teacher.yaml and schedule.yaml of a task."""
    section = prepared_task(task, given.data, folder)
    trees = {
        "teacher": teacher_config(section, given, steps=CASES[task].teacher_steps),
        "schedule": schedule_config(section, given),
    }
    for name, tree in trees.items():
        # Every leg gives its own folder on the command line.
        write_config(ROOT / folder / f"{name}.yaml", {"output_dir": str(folder / name), **tree})


def legs(folder: Path, seed: int, given: argparse.Namespace) -> list[Leg]:
    """The runs of one seed, in order: each teacher is its seed's."""

    def leg(name: str, config: str, *overrides: str) -> Leg:
        output = folder / f"{name}-seed-{seed}"
        return Leg(name, folder / f"{config}.yaml", output, (*overrides, f"seed={seed}"))

    teacher = leg("teacher", "teacher")
    model = f"teacher.model={teacher.output / 'final'}"
    return [
        teacher,
        *(leg(name, "schedule", *given.set, f"method.name={name}", model) for name in METHODS),
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(CASES)}")
    parser.add_argument("--seeds", type=integers, default=[1], help="separated by commas")
    parser.add_argument("--grid", type=fractions, default=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--tradeoff", type=float, default=0.2)
    parser.add_argument("--teacher", default="4x192", help="layers x width, or a pretrained folder")
    parser.add_argument("--teacher-steps", type=int, help="default: what the task needs")
    parser.add_argument("--teacher-rate", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=200, help="of a trial and of every leg")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=16, help="of each rank's batch")
    parser.add_argument("--evaluations", type=int, default=2, help="in every training")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--data", type=Path, default=SHARED, help="holds clinc150/ and glue/SST-2/")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="for the three schedules"
    )
    given = parser.parse_args(arguments)
    for task in given.tasks:
        if task not in CASES:
            parser.error(f"there is no task {task!r}; known: {', '.join(CASES)}")
    given.tasks = given.tasks or list(CASES)
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
