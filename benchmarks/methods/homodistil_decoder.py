"""HomoDistil on a real pretrained decoder, against its controls: losses, and jumps on the way.

`python benchmarks methods.homodistil_decoder --data FOLDER [--seeds 1,2,3]`, on the CPU, `--jobs`
runs of one rank side by side.

The teacher is a Llama of 260,000 weights, pretrained on TinyStories by the author of llama2.c. The
student keeps half of the width, of the neurons and of the key-value groups. Every variant sees the
same 1000 stories for as many steps at the same rate. `homodistil` is the method; `early` has its
final size after 30 % of the steps, `one_shot` after 20 steps; `one_shot_alone` is pruned as
`one_shot` and learns without the teacher; `platon`, `magnitude` and `random_scores` choose the
units by other scores; `random` is the student's shape from random weights, distilled; `alone` is
the same without the teacher.
`--equal-cost` then trains the variants that take less or more time than the method once more, for
as many steps as take as long as the method.
Each run has a folder below `--out`, is gone on with where it was, and is done once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lib.books import TEACHER
from lib.launching import Leg, leg_of, reports_of, run_side_by_side, write_leg_configs
from lib.options import add_runs, need, parsed, parser_of
from lib.stories import PARTS, TRAIN, stories_task, stories_teacher, write_stories_tokenizer
from lib.tables import SAME_COST, mean_text, print_scores, table_of
from methods.homodistil import (
    ALONE,
    BASELINES,
    CUBIC,
    EARLY,
    NO_TEACHER,
    ONE_SHOT,
    ONE_SHOT_ALONE,
    Found,
    largest_jump,
    run_of,
    seconds,
)

RUN = "run"
AT_ONCE = ("method.schedule=one_shot", "method.pruning_start=20")
RUNS = {
    CUBIC: (f"baselines=[{', '.join(BASELINES)}]",),
    EARLY: (),
    ONE_SHOT: AT_ONCE,
    ONE_SHOT_ALONE: (*AT_ONCE, NO_TEACHER),
    "platon": ("method.score=platon",),
    "magnitude": ("method.score=magnitude",),
    "random_scores": ("method.score=random",),
}
EARLY_SHARE = 0.3
"""Share of the steps after which `early` has its final size."""
NO_DIVERGENCE = (*BASELINES, ONE_SHOT_ALONE)
SHORTEST = 40
"""Steps of the student that gives `alone` its shape in a run at equal cost."""
COST = "-cost"
"""Of the names of the runs at equal cost."""
Rows = dict[str, list[tuple[float, float | None]]]
"""By variant and seed: the loss, and the largest jump of the divergence (None without one)."""


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    need(given.data / part for part in PARTS)
    write_stories_tokenizer(given.data, given.out)
    write_leg_configs(given.out, trees(given))
    runs = legs(given)
    run_side_by_side(runs, jobs=given.jobs)
    found = Found(reports_of(runs), given.seeds, ())
    show(rows(found), given.command)
    if given.equal_cost:
        longer = cost_legs(given, steps_at_cost(found, given.steps))
        run_side_by_side(longer, jobs=given.jobs)
    return 0


def trees(given: argparse.Namespace) -> dict[str, Any]:
    tree = {
        "task": stories_task(given.data, given.out),
        "teacher": stories_teacher(given.data),
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {"name": "homodistil", "target_width": 32, "round_to": 4, "cuts": 4},
        "train": {**TRAIN, "max_steps": given.steps},
        "eval": {"eval_steps": max(1, given.steps // 40), "keep_best": False},
    }
    return {RUN: tree}


def legs(given: argparse.Namespace) -> list[Leg]:
    """Return the runs of all seeds; the longest run of a seed is the first."""
    return [
        leg_of(given.out, f"{name}-{seed}", RUN, (*_overrides(name, given.steps), f"seed={seed}"))
        for seed in given.seeds
        for name in RUNS
    ]


def _overrides(name: str, steps: int) -> tuple[str, ...]:
    early = f"method.pruning_end={int(EARLY_SHARE * steps)}"
    return (early,) if name == EARLY else RUNS[name]


def cost_legs(given: argparse.Namespace, longer: Mapping[str, int]) -> list[Leg]:
    """Return the runs of all seeds at equal cost. longer: steps by variant."""
    runs = {f"{run_of(name)}{COST}": _longer(name, steps) for name, steps in longer.items()}
    return [
        leg_of(given.out, f"{run}-{seed}", RUN, (*overrides, f"seed={seed}"))
        for seed in given.seeds
        for run, overrides in runs.items()
    ]


def _longer(name: str, steps: int) -> tuple[str, ...]:
    if name == ALONE:
        return (f"train.max_steps={SHORTEST}", f"baselines=[{ALONE}]", f"alone.max_steps={steps}")
    return (*_overrides(name, steps), f"train.max_steps={steps}")


def at_equal_cost(found: Found, longer: Mapping[str, Any]) -> Found:
    """Return the reports of the runs at equal cost, under the names of the runs at equal steps."""
    reports = {name.replace(COST, ""): report for name, report in longer.items()}
    return found._replace(reports=reports)


def steps_at_cost(found: Found, steps: int) -> dict[str, int]:
    """Return the steps that take as long as the method's training, by variant.

    From the median over the seeds. A variant that takes as long as the method within `SAME_COST`
    is left out, and so is `random`, which has the steps of the run that it belongs to.
    """
    longer = dict[str, int]()
    for name in (*RUNS, ALONE):
        times = [(seconds(found, name, seed), seconds(found, CUBIC, seed)) for seed in found.seeds]
        costs = [ours / aim for ours, aim in times if ours is not None and aim is not None]
        if costs and abs(median(costs) - 1) >= SAME_COST:
            longer[name] = round(steps / median(costs))
    return longer


def rows(found: Found) -> Rows:
    return {
        name: [
            (loss, None if name in NO_DIVERGENCE else largest_jump(report["pruning"]))
            for seed in found.seeds
            if (report := found.pruning(name, seed)) is not None
            and (loss := loss_of(found, name, seed)) is not None
        ]
        for name in (*RUNS, *BASELINES)
    }


def loss_of(found: Found, variant: str, seed: int) -> float | None:
    """Return the loss of a student, or of the teacher, on the held-out stories."""
    report = found.pruning(CUBIC if variant == TEACHER else variant, seed)
    if report is None:
        return None
    if variant in BASELINES:
        # A run at equal cost has one baseline.
        return report["baselines"].get(variant, {}).get("loss")
    return report["teacher" if variant == TEACHER else "student"]["metrics"]["loss"]


def show(found: Rows, command: str) -> None:
    losses = {name: [loss for loss, _ in pairs] for name, pairs in found.items()}
    lines = {
        name: {
            "held-out loss": mean_text(losses[name], 3),
            "largest jump": mean_text([jump for _, jump in pairs if jump is not None], 3),
        }
        for name, pairs in found.items()
    }
    print(table_of("variant", lines))
    ratios = [
        f"{cubic / one_shot:.3f}"
        for (_, cubic), (_, one_shot) in zip(found[CUBIC], found[ONE_SHOT], strict=True)
        if cubic and one_shot
    ]
    what = "HomoDistil of a pretrained Llama, held-out loss in nats per token"
    extra = [f"jump of {CUBIC} over {ONE_SHOT} {', '.join(ratios)}"]
    print_scores(what, command, losses, decimals=3, extra=extra)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "homodistil_decoder", data="lm/ and weights/")
    parser.add_argument("--steps", type=int, default=400)
    words = "train the variants for as long as the method, too"
    parser.add_argument("--equal-cost", action="store_true", help=words)
    return parsed(parser, __name__, arguments)
