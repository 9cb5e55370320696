"""Shrink of a classifier against kept layers and DistilBERT's way, a run per size.

`python benchmarks methods.shrink_encoder --data FOLDER [--setting clinc150-few]
[--sizes 40%,20%,10%] [--runs each,layers-2,layers-1] [--rate 1e-3] [--seeds 1,2,3]`, on the CPU, or
with `DS_ACCELERATOR=cuda` on a GPU, one rank.

The teacher is all-MiniLM-L6-v2, fine-tuned as in the evidence, once. `each` cuts it in a run per
size; `layers-N` keeps the most important layers as they are and trains as long, and so does
`distilbert-N` by the recipe of DistilBERT (Sanh et al. 2019, arXiv 1910.01108): evenly spaced
layers, soft targets at temperature 2, labels, and the cosine of the last hidden states, weighed 5,
2 and 1. Sizes are shares of the operations of the layers, or speed-ups such as 2x,4x,8x. Scores are
of the test rows, beside that of the student on the validation rows, by which a rate is chosen; each
run has a folder below `--out`, is gone on with where it was, and is done once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from evidence.settings import SETTINGS
from lib.launching import (
    Leg,
    Report,
    fetch_teacher,
    finished,
    leg_of,
    report_of,
    run_side_by_side,
    write_leg_configs,
)
from lib.options import add_runs, need, parsed, parser_of
from lib.tables import Columns, columns_of, print_models

EACH = "each"
KEPT = {"layers": "importance", "distilbert": "spacing"}
"""Arms that keep layers, such as `layers-2`, and how they choose them."""
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "per_device_train_batch_size": 32}
OBJECTIVE = [{"loss": "soft_target_kl"}, {"loss": "hard_cross_entropy", "count": "rows"}]
DISTILBERT = [
    {"loss": "soft_target_kl", "weight": 5.0, "temperature": 2.0},
    {"loss": "hard_cross_entropy", "weight": 2.0},
    {"loss": "hidden_cosine", "weight": 1.0, "layer_mapping": "last"},
]


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    setting = SETTINGS[given.setting]
    need(given.data / part for part in setting.needs)
    setting.write_splits(given.data, given.out / "data")
    write_leg_configs(given.out, configs(given))
    report_of(leg_of(given.out, "teacher", "teacher", ()), ranks=1)
    legs = [
        leg for seed in given.seeds for name in given.runs for leg in legs_of(given, name, seed)
    ]
    run_side_by_side(legs, jobs=given.jobs)
    what = f"Shrink of a classifier ({given.setting}) to {', '.join(given.sizes)}"
    print_models(what, given.command, models(given), reference=given.runs[0])
    return 0


def configs(given: argparse.Namespace) -> dict[str, Any]:
    setting, data = SETTINGS[given.setting], given.out / "data"
    task = {**setting.task(data), "test_files": str(data / "test.csv")}
    train = {"max_steps": given.steps, "learning_rate": given.rate, **SCHEDULE}
    teacher = str(given.out / "teacher" / "final")
    student = {"model": "from_teacher", "dropout": 0.0}
    shared = {"task": task, "teacher": {"model": teacher, "cache": "auto"}, "train": train}
    single = {**shared, "method": {"name": "single"}}
    return {
        "teacher": {
            "task": task,
            "student": {"model": str(fetch_teacher())},
            "method": {"name": "finetune"},
            "train": setting.teacher.train(),
            "eval": {"latency": False},
        },
        "shrink": {**shared, "student": student, "method": {"name": "shrink"}},
        "layers": {**single, "student": student, "objective": OBJECTIVE},
        "distilbert": {
            **single,
            "teacher": {"model": teacher},  # a cache has no hidden states
            "student": {"model": "from_teacher"},  # with the teacher's dropout
            "objective": DISTILBERT,
        },
    }


def legs_of(given: argparse.Namespace, name: str, seed: int) -> list[Leg]:
    kind, _, count = name.partition("-")
    if kind in KEPT:
        keep = f"student.layers={{keep: {count}, by: {KEPT[kind]}}}"
        return [leg_of(given.out, f"{name}-{given.rate:g}-{seed}", kind, (keep, f"seed={seed}"))]
    legs = list[Leg]()
    for size in given.sizes:
        key = "speedup" if size.endswith("x") else "flops"
        folder = f"{name}-{size.replace('%', '')}-{given.rate:g}-{seed}"
        words = (f"method.{key}={size}", f"seed={seed}")
        legs.append(leg_of(given.out, folder, "shrink", words))
    return legs


def models(given: argparse.Namespace) -> dict[str, Columns]:
    """Return the score of each size, the speed-up and the seconds of training, by arm and seed."""

    def of_arm(name: str, seed: int) -> dict[str, float | None]:
        reports = [finished(leg) for leg in legs_of(given, name, seed)]
        made = [numbers(given, report) for report in reports if report is not None]
        seconds = sum(one.pop("seconds") for one in made)
        return {key: value for one in made for key, value in one.items()} | {"seconds": seconds}

    return {
        name: columns_of(given.seeds, lambda seed, name=name: of_arm(name, seed))
        for name in given.runs
    }


def numbers(given: argparse.Namespace, report: Report) -> dict[str, float]:
    metric = report["metric_name"]
    title = "student"
    if "asked.what" in report:
        title = f"{report['asked.value']:g}" + "x" * (report["asked.what"] == "speedup")
    scores = {
        "teacher": 100 * report[f"teacher.{metric}"],
        "validation": 100 * report["stages"][-1][metric],
        "seconds": sum(stage["seconds"] for stage in report["stages"]),
        title: 100 * report[f"student.{metric}"],
    }
    if 32 in report["batches"]:
        scores[f"faster, {title}"] = report["student.speedup_batch_32"]
    return scores


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "shrink_encoder", jobs=1, data="clinc150/, banking77/ or glue/")
    parser.add_argument("--setting", choices=SETTINGS, default="clinc150-few")
    parser.add_argument("--sizes", default="40%,20%,10%")
    parser.add_argument("--steps", type=int, default=1000, help="of every student")
    parser.add_argument("--rate", type=float, default=1e-3, help="of every student")
    parser.add_argument("--runs", default=f"{EACH},layers-2,layers-1")
    given = parsed(parser, __name__, arguments)
    given.sizes, given.runs = given.sizes.split(","), given.runs.split(",")
    given.out = given.out / given.setting
    return given
