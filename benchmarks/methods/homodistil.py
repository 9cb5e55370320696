"""HomoDistil against its controls: a pretrained Llama is pruned to half of its width.

`python benchmarks methods.homodistil --data FOLDER [--steps 400] [--seeds 1,2,3]`, on the CPU, one
rank. The teacher is a Llama of 260,000 weights, pretrained on TinyStories by the author of
llama2.c; half of its width, neurons and key-value groups are left.

For every seed, these students see the same text for as many steps at the same rate:

* `homodistil` (cubic, over 30 % of the steps), `late` (cubic, over 70 %) and `one_shot` are pruned
  out of the teacher while they are distilled;
* `one_shot_alone` is pruned as `one_shot` and learns without the teacher;
* `random` starts from random weights and is distilled with the same losses; `alone` starts from
  random weights and learns without the teacher.

The table has held-out losses, seconds of training, and the largest jump of the divergence from the
teacher between two evaluations. Each run has a folder below `--out`, is gone on with where it was,
and is done once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

from lib import launching, stories
from lib.data import Config
from lib.options import add_runs, need, parsed, parser_of, positive
from lib.tables import columns_of, print_models

CUBIC, TEACHER = "homodistil", "teacher"
BASELINES = ("random", "alone")
AT_ONCE = 20
"""The step after which `one_shot` is cut."""


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    need(given.data / part for part in stories.PARTS)
    stories.write_stories_tokenizer(given.data, given.out)
    launching.write_leg_configs(given.out, {"prune": config(given)})
    some = legs(given)
    launching.run_side_by_side(some, jobs=given.jobs)
    reports = launching.reports_of(some)
    lines = {
        name: columns_of(given.seeds, partial(numbers, reports, name))
        for name in (TEACHER, *variants(given.steps), *BASELINES)
    }
    what = "HomoDistil of a pretrained Llama"
    print_models(what, given.command, lines, reference=CUBIC)
    return 0


def config(given: argparse.Namespace) -> Config:
    return {
        "task": stories.stories_task(given.data, given.out),
        "teacher": stories.stories_teacher(given.data),
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {"name": "homodistil", "target_width": 32, "round_to": 4, "cuts": 4},
        "train": {**stories.TRAIN, "max_steps": given.steps},
        "eval": {"eval_steps": max(1, given.steps // 40), "keep_best": False},
    }


def variants(steps: int) -> dict[str, tuple[str, ...]]:
    """Return the students that are pruned, with what wins over the config."""
    at_once = (f"method.every={AT_ONCE}", f"method.pruning_end={AT_ONCE}")
    return {
        # Students from random weights are baselines of this run.
        CUBIC: (f"baselines=[{', '.join(BASELINES)}]",),
        "late": (f"method.pruning_end={int(0.7 * steps)}",),
        "one_shot": at_once,
        "one_shot_alone": (*at_once, "objective=[{loss: hard_cross_entropy}]"),
    }


def legs(given: argparse.Namespace) -> list[launching.Leg]:
    return [
        launching.leg_of(given.out, f"{name}-{seed}", "prune", (*overrides, f"seed={seed}"))
        for seed in given.seeds
        for name, overrides in variants(given.steps).items()
    ]


def numbers(
    reports: Mapping[str, launching.Report | None], name: str, seed: int
) -> dict[str, float | None]:
    is_pruned = name not in (TEACHER, *BASELINES)
    report = reports.get(f"{name if is_pruned else CUBIC}-{seed}")
    if report is None:
        return {}
    seconds = launching.seconds_of(report)
    if not is_pruned:
        return {"loss": report[f"{name}.loss"], "seconds": seconds.get(name)}
    columns: dict[str, float | None] = {
        "loss": report["student.loss"],
        "seconds": sum(spent for stage, spent in seconds.items() if stage not in BASELINES),
        "parameters": report["student.parameters"],
    }
    if name != "one_shot_alone":
        path = [0.0, *(row["teacher_kl"] for row in report["pruning"])]
        columns["largest jump"] = max(after - before for before, after in pairwise(path))
    return columns


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "homodistil", data="lm/ and weights/")
    parser.add_argument("--steps", type=positive, default=400)
    return parsed(parser, __name__, arguments)
