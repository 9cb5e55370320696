"""HomoDistil against its controls: on text and then on tasks, or of a pretrained decoder.

`python benchmarks methods.homodistil --data FOLDER [--stages teacher,prune,tasks,table]
[--decoder [--steps 1600]]`, on the CPU.

* teacher: a BERT of 4 x 192 learns masked tokens of eleven novels, first in short rows. With
  `--decoder`, the teacher is a Llama of 260,000 weights, pretrained on TinyStories by the author of
  llama2.c, and there are no tasks.
* prune: for every seed, students of half its width see the same text for as many steps at the same
  rate: `homodistil` (cubic, over 30 % of the steps), `one_shot` and `late` (cubic, over 70 %) are
  pruned out of the teacher while they are distilled; `one_shot_alone` is pruned as `one_shot` and
  learns without the teacher; `platon`, `magnitude` and `random_scores` (decoder) choose the units
  by other scores; `random` starts from random weights and is distilled with the same losses;
  `alone` starts from random weights and learns without the teacher.
* tasks: all of these, and the teacher, learn tasks from labels; the last weights are scored.
* table: means and deviations over the seeds, and the largest jump of the divergence from the
  teacher between two evaluations.

One held-out part of the text serves all runs. Each run has a folder below `--out`, is gone on with
where it was, and is done once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from lib import books, launching, stories
from lib.data import BOOKS, TASKS, Config
from lib.options import add_runs, need, parsed, parser_of, words_of
from lib.tables import columns_of, print_models

CUBIC, ALONE = "homodistil", "alone"
BASELINES = ("random", ALONE)
AT_ONCE = "method.schedule=one_shot"
PRUNED = {
    CUBIC: (f"baselines=[{', '.join(BASELINES)}]",),
    "one_shot": (AT_ONCE,),
    "one_shot_alone": (AT_ONCE, "objective=[{loss: hard_cross_entropy}]"),
    "late": (),
}
"""The students that are pruned, with what wins over the config `prune`."""
SCORES = {
    "platon": ("method.score=platon",),
    "magnitude": ("method.score=magnitude",),
    "random_scores": ("method.score=random",),
}
DECODER_SIZES = books.Sizes(steps=400, student=32)
"""Half of the width is left, as of the encoder."""


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.decoder:
        need(given.data / part for part in stories.PARTS)
        stories.write_stories_tokenizer(given.data, given.out)
    else:
        need(given.data / part for part in (BOOKS, *(TASKS[name].data for name in given.tasks)))
        books.write_text(given.data, given.out / "text", given.sizes)
    launching.write_leg_configs(given.out, trees(given))
    for stage in given.stages:
        STAGES[stage](given)
    return 0


def trees(given: argparse.Namespace) -> dict[str, Any]:
    if given.decoder:
        return {"prune": decoder_config(given)}
    return {
        books.SHORT: books.short_config(given),
        books.TEACHER: books.teacher_config(given),
        "prune": encoder_config(given),
        **{f"task-{name}": books.task_config(name, given) for name in given.tasks},
    }


def encoder_config(given: argparse.Namespace) -> Config:
    sizes: books.Sizes = given.sizes
    train = books.text_train(sizes.short_rows // given.ranks, sizes.steps, sizes.rate)
    every = max(1, sizes.steps // sizes.evaluations)
    method = {"target_width": sizes.student, "pruning_start": sizes.start}
    teacher = str(given.out / books.TEACHER / "final")
    return {
        "task": books.text_task(given.out / "text", sizes.short),
        "teacher": {"model": teacher, "deepspeed": "teacher_zero0"},
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {"name": "homodistil", **method},
        **books.common_sections(train, evaluate_every=every, log_every=every),
    }


def decoder_config(given: argparse.Namespace) -> Config:
    """Half of the width, neurons and key-value groups are left."""
    sizes: books.Sizes = given.sizes
    method = {"target_width": sizes.student, "round_to": 4, "cuts": 4}
    return {
        "task": stories.stories_task(given.data, given.out),
        "teacher": stories.stories_teacher(given.data),
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {"name": "homodistil", **method},
        "train": {**stories.TRAIN, "max_steps": sizes.steps},
        "eval": {"eval_steps": max(1, sizes.steps // 40), "keep_best": False},
    }


def teach(given: argparse.Namespace) -> None:
    report = [launching.report_of(leg, ranks=given.ranks) for leg in teacher_legs(given)][-1]
    loss, accuracy = (report[f"student.{books.HELD_OUT}.{name}"] for name in ("loss", "accuracy"))
    print(f"teacher, held out: loss {loss:.4f}, accuracy {accuracy:.4f}")


def prune(given: argparse.Namespace) -> None:
    legs = pruning_legs(given)
    if given.decoder:
        launching.run_side_by_side(legs, jobs=given.jobs)
    else:
        for leg in legs:
            launching.report_of(leg, ranks=given.ranks)


def tune(given: argparse.Namespace) -> None:
    launching.run_side_by_side(task_legs(given), jobs=given.jobs)


def tell(given: argparse.Namespace) -> None:
    reports = launching.reports_of([*pruning_legs(given), *task_legs(given)])

    def of_seed(name: str, seed: int) -> dict[str, float | None]:
        scores = {t: launching.points(reports.get(f"{t}-{name}-{seed}")) for t in given.tasks}
        return numbers(reports, name, seed) | scores

    models = (books.TEACHER, *PRUNED, *(SCORES if given.decoder else ()), *BASELINES)
    lines = {name: columns_of(given.seeds, partial(of_seed, name)) for name in models}
    what = "HomoDistil of a pretrained Llama" if given.decoder else "HomoDistil"
    print_models(what, given.command, lines, reference=CUBIC)


STAGES = {"teacher": teach, "prune": prune, "tasks": tune, "table": tell}


def teacher_legs(given: argparse.Namespace) -> list[launching.Leg]:
    """Return the runs that make the teacher; the second goes on with the model of the first."""
    return [launching.leg_of(given.out, name, name, ()) for name in (books.SHORT, books.TEACHER)]


def pruning_legs(given: argparse.Namespace) -> list[launching.Leg]:
    """Return the runs of all seeds; students from random weights are baselines of the first."""
    late = (f"method.pruning_end={int(0.7 * given.sizes.steps)}",)
    # The scores are compared where the stored runs of the sensitivity are, with the later end.
    further = dict.fromkeys(("late", *SCORES), late)
    if given.decoder:
        at_once = (f"method.pruning_start={given.sizes.start}",)
        further |= {"one_shot": at_once, "one_shot_alone": at_once}
    return [
        launching.leg_of(
            given.out,
            f"{name}-{seed}",
            "prune",
            (*overrides, *further.get(name, ()), f"seed={seed}"),
        )
        for seed in given.seeds
        for name, overrides in (PRUNED | (SCORES if given.decoder else {})).items()
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


def numbers(
    reports: Mapping[str, launching.Report | None], variant: str, seed: int
) -> dict[str, float | None]:
    is_pruned = variant in PRUNED | SCORES
    report = reports.get(f"{variant if is_pruned else CUBIC}-{seed}")
    if report is None:
        return {}
    model = "student" if is_pruned else variant
    columns = {"loss": launching.metric_of(report, model, "loss", books.HELD_OUT)}
    seconds = launching.seconds_of(report)
    if is_pruned:
        columns["seconds"] = sum(s for name, s in seconds.items() if name not in BASELINES)
        columns["parameters"] = report["student.parameters"]
        if variant != "one_shot_alone":
            path = [0.0, *(row["teacher_kl"] for row in report["pruning"])]
            columns["largest jump"] = max(after - before for before, after in pairwise(path))
    elif variant in BASELINES:
        columns["seconds"] = seconds[variant]
    return columns


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "homodistil", data="lm/, glue/, clinc150/, weights/ …")
    parser.add_argument("--stages", type=words_of(STAGES), help="with commas; default: all")
    parser.add_argument("--tasks", type=words_of(TASKS), default=[*TASKS], help=f"of {[*TASKS]}")
    parser.add_argument("--ranks", type=int, default=2, help="of the stages teacher and prune")
    parser.add_argument("--decoder", action="store_true", help="the Llama of the stories")
    books.add_changeable(parser, ["steps"])
    parser.add_argument("--quick", action="store_true", help="tiny models and a few steps")
    given = parsed(parser, __name__, arguments)
    whole = DECODER_SIZES if given.decoder else books.Sizes()
    sizes = books.QUICK if given.quick else whole
    given.sizes = sizes._replace(**books.changed(given, ["steps"]))
    if given.decoder:
        given.out, given.tasks = given.out / "decoder", []
    given.stages = given.stages or (["prune", "table"] if given.decoder else [*STAGES])
    books.check_ranks(parser, given, given.sizes.rows)
    return given
