"""HomoDistil against its controls, on text and then on tasks: one run after another.

`python benchmarks methods.homodistil --data FOLDER [--stages teacher,prune,tasks,table]`, on the
CPU.

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
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lib import books, launching
from lib.data import BOOKS, TASKS, Config
from lib.options import add_runs, need, parsed, parser_of, words_of
from lib.tables import mean_and_deviation, mean_text, print_scores, table_of

CUBIC, ONE_SHOT, ONE_SHOT_ALONE, EARLY = "homodistil", "one_shot", "one_shot_alone", "early"
PRUNED = {CUBIC: "cubic", ONE_SHOT: "one_shot", ONE_SHOT_ALONE: "one_shot", EARLY: "cubic"}
"""The students that are pruned, by schedule; the last has its final size sooner."""
NO_TEACHER = "objective=[{loss: hard_cross_entropy}]"
"""Override of `one_shot_alone`: the student starts as the teacher, and learns from text alone."""
RANDOM, ALONE = BASELINES = ("random", "alone")
CHOSEN = ("sst2", "banking77", "clinc150")


class Found(NamedTuple):
    """The reports of the runs by name, None of a run that has not finished."""

    reports: Mapping[str, launching.Report | None]
    seeds: Sequence[int]
    tasks: Sequence[str]

    def pruning(self, variant: str, seed: int) -> launching.Report | None:
        return self.reports.get(f"{run_of(variant)}-{seed}")

    def score(self, task: str, variant: str, seed: int) -> float | None:
        """Return the main metric of a task, in points."""
        report = self.reports.get(f"{task}-{variant}-{seed}")
        return None if report is None else 100 * report["student"]["metrics"][report["metric_name"]]


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    need(given.data / part for part in (BOOKS, *(TASKS[name].data for name in given.tasks)))
    books.write_text(given.data, given.out / "text", given.sizes)
    launching.write_leg_configs(given.out, trees(given))
    for stage in given.stages:
        STAGES[stage](given)
    return 0


def trees(given: argparse.Namespace) -> dict[str, Any]:
    return {
        books.SHORT: books.short_config(given.out, given),
        books.TEACHER: books.teacher_config(given.out, given),
        "prune": pruning_config(given.out, given),
        **{f"task-{name}": books.task_config(name, given.out, given) for name in given.tasks},
    }


def pruning_config(folder: Path, given: argparse.Namespace) -> Config:
    """A student that is pruned out of the teacher; the schedule and the baselines win over it."""
    sizes: books.Sizes = given.sizes
    train = books.text_train(sizes.short_rows // given.ranks, sizes.steps, sizes.rate)
    every = max(1, sizes.steps // sizes.evaluations)
    return {
        "task": books.text_task(folder / "text", sizes.short),
        "teacher": {"model": str(folder / books.TEACHER / "final"), "deepspeed": "teacher_zero0"},
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {
            "name": "homodistil",
            "target_width": sizes.student,
            "pruning_start": sizes.start,
        },
        **books.common_sections(train, evaluate_every=every, log_every=every),
    }


def teach(given: argparse.Namespace) -> None:
    report = [launching.report_of(leg, ranks=given.ranks) for leg in teacher_legs(given)][-1]
    metrics = report["evaluation_sets"][books.HELD_OUT]["metrics"]["student"]
    print(f"teacher, held out: loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.4f}")


def prune(given: argparse.Namespace) -> None:
    for leg in pruning_legs(given):
        launching.report_of(leg, ranks=given.ranks)


def tune(given: argparse.Namespace) -> None:
    launching.run_side_by_side(task_legs(given), jobs=given.jobs)


def tell(given: argparse.Namespace) -> None:
    runs = [*teacher_legs(given), *pruning_legs(given), *task_legs(given)]
    show(Found(launching.reports_of(runs), given.seeds, given.tasks), given.command)


STAGES = {"teacher": teach, "prune": prune, "tasks": tune, "table": tell}


def teacher_legs(given: argparse.Namespace) -> list[launching.Leg]:
    """Return the runs that make the teacher; the second goes on with the model of the first."""
    return [launching.leg_of(given.out, name, name, ()) for name in (books.SHORT, books.TEACHER)]


def pruning_legs(given: argparse.Namespace) -> list[launching.Leg]:
    """Return four runs per seed; the students from random weights are baselines of the first."""
    further = {
        CUBIC: (f"baselines=[{', '.join(BASELINES)}]",),
        ONE_SHOT: (),
        ONE_SHOT_ALONE: (NO_TEACHER,),
        EARLY: (f"method.pruning_end={given.sizes.early}",),
    }
    return [
        launching.leg_of(
            given.out,
            f"{name}-{seed}",
            "prune",
            (f"method.schedule={schedule}", *further[name], f"seed={seed}"),
        )
        for seed in given.seeds
        for name, schedule in PRUNED.items()
    ]


def task_legs(given: argparse.Namespace) -> list[launching.Leg]:
    return [
        leg
        for seed in given.seeds
        for leg in books.task_legs_of(given.out, models(given, seed), given.tasks, seed=seed)
    ]


def models(given: argparse.Namespace, seed: int) -> dict[str, Path]:
    first = given.out / f"{CUBIC}-{seed}"
    return {
        books.TEACHER: given.out / books.TEACHER / "final",
        **{name: given.out / f"{name}-{seed}" / "final" for name in PRUNED},
        **{name: first / "stages" / name for name in BASELINES},
    }


def run_of(variant: str) -> str:
    """Return the run that trains a student; a baseline belongs to the run of the method."""
    return CUBIC if variant in BASELINES else variant


def show(found: Found, command: str) -> None:
    columns = {name: numbers(found, name) for name in (books.TEACHER, *PRUNED, *BASELINES)}
    lines = {
        name: {title: _cell(values) for title, values in line.items()}
        for name, line in columns.items()
    }
    print(table_of("model", lines))
    ratios = []
    for seed, (cubic, one_shot) in homotopy(found).items():
        ratios.append(f"{one_shot / cubic:.1f}")
        print(
            f"seed {seed}: largest jump of the divergence: cubic {cubic:.4f}, one_shot "
            f"{one_shot:.4f}, ratio {ratios[-1]}"
        )
    scores = {
        f"{name} {title}": line[title]
        for name, line in columns.items()
        for title in ("loss", "tasks")
    }
    what = "HomoDistil, held-out loss and mean score of the tasks"
    extra = [f"jump of one_shot over cubic {', '.join(ratios)}"] if ratios else []
    print_scores(what, command, scores, decimals=3, extra=extra)


def numbers(found: Found, variant: str) -> dict[str, list[float]]:
    """Return every column's values over the seeds, without those of unfinished runs."""
    columns = {"loss": [held_out(found, variant, seed) for seed in found.seeds]}
    by_task = {t: [found.score(t, variant, seed) for seed in found.seeds] for t in found.tasks}
    complete = [scores for scores in zip(*by_task.values(), strict=True) if None not in scores]
    columns |= by_task | {"tasks": [mean_and_deviation(scores)[0] for scores in complete]}
    seeds = found.seeds[:1] if variant == books.TEACHER else found.seeds
    columns["parameters"] = [parameters(found, variant, seed) for seed in seeds]
    columns["seconds"] = [seconds(found, variant, seed) for seed in seeds]
    return {t: [v for v in values if v is not None] for t, values in columns.items()}


def held_out(found: Found, variant: str, seed: int) -> float | None:
    """Return the loss of masked tokens on all held-out text, in rows of the students' length."""
    report = found.pruning(CUBIC if variant == books.TEACHER else variant, seed)
    if report is None:
        return None
    model = "student" if variant in PRUNED else variant
    return report["evaluation_sets"][books.HELD_OUT]["metrics"][model]["loss"]


def _trained(found: Found, variant: str, seed: int) -> launching.Report | None:
    return (
        found.reports.get(books.TEACHER)
        if variant == books.TEACHER
        else found.pruning(variant, seed)
    )


def parameters(found: Found, variant: str, seed: int) -> int | None:
    """Return the number of weights; all students have one shape."""
    report = _trained(found, variant, seed)
    return None if report is None else report["student"]["parameters"]


def seconds(found: Found, variant: str, seed: int) -> float | None:
    report = _trained(found, variant, seed)
    return None if report is None else sum(s["seconds"] for s in stages_of(report, variant))


def stages_of(report: launching.Report, variant: str) -> list[launching.Report]:
    stages = {stage["name"]: stage for stage in report["stages"]}
    if variant in BASELINES:
        return [stages[variant]]
    return [stage for name, stage in stages.items() if name not in BASELINES]


def homotopy(found: Found) -> dict[int, tuple[float, float]]:
    """Return by seed the largest jumps of the schedules, gradual and at once."""
    pairs = {s: [found.pruning(name, s) for name in (CUBIC, ONE_SHOT)] for s in found.seeds}
    return {
        seed: (largest_jump(cubic["pruning"]), largest_jump(one_shot["pruning"]))
        for seed, (cubic, one_shot) in pairs.items()
        if cubic is not None and one_shot is not None
    }


def largest_jump(rows: Iterable[launching.Report]) -> float:
    """Return how far the divergence rises at most between two evaluations; it starts at 0."""
    path = [0.0, *(row["teacher_kl"] for row in rows)]
    return max(after - before for before, after in pairwise(path))


def _cell(values: Sequence[float]) -> str:
    if not values or max(values) < 1000:
        return mean_text(values, 3)
    return f"{mean_and_deviation(values)[0]:,.0f}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "homodistil", data="lm/, glue/, clinc150/, …")
    parser.add_argument("--stages", type=words_of(STAGES), default=[*STAGES], help="with commas")
    parser.add_argument("--tasks", type=words_of(TASKS), default=[*CHOSEN], help=f"of {[*TASKS]}")
    parser.add_argument("--ranks", type=int, default=2, help="of the stages teacher and prune")
    bf16 = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--bf16", **bf16, help="in the stage teacher; slow on CPUs without it")
    books.add_changeable(parser, books.CHANGEABLE)
    parser.add_argument("--quick", action="store_true", help="tiny models and a few steps")
    given = parsed(parser, __name__, arguments)
    given.sizes = (books.QUICK if given.quick else books.Sizes())._replace(
        **books.changed(given, books.CHANGEABLE)
    )
    books.check_ranks(parser, given, given.sizes.rows)
    return given
