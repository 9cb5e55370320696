"""HomoDistil against its controls, on text and then on tasks: one run after another.

`python benchmarks/homodistil.py --data FOLDER [--stages teacher,prune,tasks,table]`, on the CPU.

* teacher: a BERT of 4 x 192 learns masked tokens of eleven novels, first in short rows.
* prune: for every seed six students of half its width, a quarter of the encoder's weights, see the
  same text in short rows for as many steps at the same rate: `homodistil` (cubic, over 70 % of the
  steps), `one_shot` and `early` (cubic, over 30 %) are pruned out of the teacher while they are
  distilled; `one_shot_alone` is pruned as `one_shot` and learns masked tokens without the teacher;
  `random` starts from random weights and is distilled with the same losses; `alone` starts from
  random weights and learns masked tokens.
* tasks: all of these, and the teacher, learn three tasks from labels; the last weights are scored.
* table: means and deviations over the seeds, and the largest jump of the divergence from the
  teacher between two evaluations.

One held-out part of the novels serves all runs. Each run has a folder below `--out`, is gone on
with where it was, and is done once.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from homodistil_cases import (
    BOOKS,
    CHOSEN,
    HELD_OUT,
    QUICK,
    SHORT,
    TASKS,
    Sizes,
    pruning_config,
    short_config,
    task_config,
    teacher_config,
    write_text,
)
from homodistil_summary import (
    BASELINES,
    CUBIC,
    EARLY,
    NO_TEACHER,
    ONE_SHOT,
    ONE_SHOT_ALONE,
    PRUNED,
    TEACHER,
    Found,
    show,
)
from launching import ROOT
from legs import (
    Leg,
    leg_of,
    report_of,
    reports_of,
    run_side_by_side,
    task_legs_of,
    write_leg_configs,
)
from options import integers, positive, words_of

if TYPE_CHECKING:
    from collections.abc import Sequence

Models = dict[str, Path]
CHANGEABLE = {
    "short_steps": int,
    "teacher_steps": int,
    "teacher_rate": float,
    "steps": int,
    "rate": float,
}


def main(arguments: Sequence[str]) -> int:
    """Runs what has not finished of the stages that were asked for."""
    given = parse(arguments)
    missing = [path for path in needed(given) if not path.exists()]
    if missing:
        print(f"homodistil: error: {missing[0]} does not exist", file=sys.stderr)
        return 1
    write_configs(given)
    for stage in given.stages:
        STAGES[stage](given)
    return 0


def needed(given: argparse.Namespace) -> list[Path]:
    """All data that the script reads."""
    return [given.data / part for part in (BOOKS, *(TASKS[name].data for name in given.tasks))]


def write_configs(given: argparse.Namespace) -> None:
    """The text, and the configs that the runs override."""
    write_text(given.data, given.out / "text", given.sizes)
    write_leg_configs(given.out, trees(given))


def trees(given: argparse.Namespace) -> dict[str, Any]:
    """Return the configs that the runs override, by name."""
    return {
        SHORT: short_config(given.out, given),
        TEACHER: teacher_config(given.out, given),
        "prune": pruning_config(given.out, given),
        **{f"task-{name}": task_config(name, given.out, given) for name in given.tasks},
    }


def teach(given: argparse.Namespace) -> None:
    """The teacher, and what it knows of the held-out text."""
    report = [report_of(leg, ranks=given.ranks) for leg in teacher_legs(given)][-1]
    found = report["evaluation_sets"][HELD_OUT]["metrics"]["student"]
    print(f"teacher, held out: loss {found['loss']:.4f}, accuracy {found['accuracy']:.4f}")


def prune(given: argparse.Namespace) -> None:
    """The students of all seeds."""
    for leg in pruning_legs(given):
        report_of(leg, ranks=given.ranks)


def tune(given: argparse.Namespace) -> None:
    """Every model on every task, `--jobs` side by side."""
    run_side_by_side(task_legs(given), jobs=given.jobs)


def tell(given: argparse.Namespace) -> None:
    """The table of what has finished."""
    runs = [*teacher_legs(given), *pruning_legs(given), *task_legs(given)]
    reports = reports_of(runs)
    show(Found(reports, given.seeds, given.tasks), given.command)


STAGES = {"teacher": teach, "prune": prune, "tasks": tune, "table": tell}


def teacher_legs(given: argparse.Namespace) -> list[Leg]:
    """The runs that make the teacher; the second goes on with the model of the first."""
    return [leg_of(given.out, name, name, ()) for name in (SHORT, TEACHER)]


def pruning_legs(given: argparse.Namespace) -> list[Leg]:
    """Four runs per seed; the students from random weights are baselines of the first."""
    further = {
        CUBIC: (f"baselines=[{', '.join(BASELINES)}]",),
        ONE_SHOT: (),
        ONE_SHOT_ALONE: (NO_TEACHER,),
        EARLY: (f"method.pruning_end={given.sizes.early}",),
    }
    return [
        leg_of(
            given.out,
            f"{name}-{seed}",
            "prune",
            (f"method.schedule={schedule}", *further[name], f"seed={seed}"),
        )
        for seed in given.seeds
        for name, schedule in PRUNED.items()
    ]


def task_legs(given: argparse.Namespace) -> list[Leg]:
    """A run per model, task and seed."""
    return [
        leg
        for seed in given.seeds
        for leg in task_legs_of(given.out, models(given, seed), given.tasks, seed=seed)
    ]


def models(given: argparse.Namespace, seed: int) -> Models:
    """The folders of a seed's finished models."""
    first = given.out / f"{next(iter(PRUNED))}-{seed}"
    return {
        TEACHER: given.out / TEACHER / "final",
        **{name: given.out / f"{name}-{seed}" / "final" for name in PRUNED},
        **{name: first / "stages" / name for name in BASELINES},
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True, help="holds lm/, glue/, clinc150/, …")
    parser.add_argument("--stages", type=words_of(STAGES), default=[*STAGES], help="with commas")
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3], help="separated by commas")
    parser.add_argument("--tasks", type=words_of(TASKS), default=[*CHOSEN], help=f"of {[*TASKS]}")
    parser.add_argument("--ranks", type=int, default=2, help="of the stages teacher and prune")
    parser.add_argument(
        "--jobs", type=positive, default=2, help="tasks side by side, one rank each"
    )
    bf16 = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--bf16", **bf16, help="in the stage teacher; slow on CPUs without it")
    for name, kind in CHANGEABLE.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, help="in place of the benchmark's own")
    parser.add_argument("--quick", action="store_true", help="tiny models and a few steps")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/homodistil"))
    given = parser.parse_args(arguments)
    given.command = shlex.join(["python", "benchmarks/homodistil.py", *arguments])
    changed = {name: getattr(given, name) for name in CHANGEABLE if getattr(given, name)}
    given.sizes = (QUICK if given.quick else Sizes())._replace(**changed)
    if given.sizes.rows % given.ranks:
        parser.error(f"--ranks: {given.sizes.rows} rows cannot be shared by {given.ranks} ranks")
    # The runs start in the repository.
    given.data, given.out = given.data.resolve(), ROOT / given.out
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
