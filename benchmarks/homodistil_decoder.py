"""HomoDistil on a real pretrained decoder, against its controls: losses, and jumps on the way.

`python benchmarks/homodistil_decoder.py --data FOLDER [--seeds 1,2,3]`, on the CPU, one rank.

The teacher is a Llama of 260,000 weights, pretrained on TinyStories by the author of llama2.c. The
student keeps half of the width, of the neurons and of the key-value groups. Every variant sees the
same 1000 stories for as many steps at the same rate. `cubic` is the method; `one_shot` removes all
units after 20 steps; `platon`, `magnitude` and `random_scores` choose the units by other scores;
`random` is the student's shape from random weights, distilled; `alone` learns without a teacher.
Each run has a folder below `--out`, is gone on with where it was, and is done once.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from given_data import is_incomplete
from homodistil_summary import largest_jump
from launching import ROOT, write_config
from legs import Leg, report_of
from machine import markdown_row, mean_and_deviation, print_row
from options import integers
from stories_case import PARTS, TRAIN, stories_task, stories_teacher, write_stories_tokenizer
from summary import aligned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUNS = {
    "cubic": ("baselines=[random, alone]",),
    "one_shot": ("method.schedule=one_shot", "method.pruning_start=20"),
    "platon": ("method.score=platon",),
    "magnitude": ("method.score=magnitude",),
    "random_scores": ("method.score=random",),
}
BASELINES = ("random", "alone")
Rows = dict[str, list[tuple[float, float | None]]]
"""By variant and seed: the loss, and the largest jump of the divergence (None of a baseline)."""


def main(arguments: Sequence[str]) -> int:
    """Runs what has not finished, and prints the table."""
    given = parse(arguments)
    if is_incomplete("homodistil_decoder", (given.data / part for part in PARTS)):
        return 1
    write_stories_tokenizer(given.data, given.out)
    write_config(given.out / "run.yaml", config(given))
    reports = {
        (name, seed): report_of(leg(given, name, seed), ranks=1)
        for seed in given.seeds
        for name in RUNS
    }
    show(rows(reports), shlex.join(["python", "benchmarks/homodistil_decoder.py", *arguments]))
    return 0


def config(given: argparse.Namespace) -> dict[str, Any]:
    """The run that the variants change."""
    steps = given.steps
    return {
        "output_dir": str(given.out / "run"),
        "task": stories_task(given.data, given.out),
        "teacher": stories_teacher(given.data),
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {"name": "homodistil", "target_width": 32, "round_to": 4, "cuts": 4},
        "train": {**TRAIN, "max_steps": steps},
        "eval": {"eval_steps": max(1, steps // 40), "keep_best": False},
    }


def leg(given: argparse.Namespace, name: str, seed: int) -> Leg:
    """One run."""
    folder = f"{name}-{seed}"
    return Leg(folder, given.out / "run.yaml", given.out / folder, (*RUNS[name], f"seed={seed}"))


def rows(reports: Mapping[tuple[str, int], Mapping[str, Any]]) -> Rows:
    """The numbers of every variant over the seeds."""
    found: Rows = {name: [] for name in (*RUNS, *BASELINES)}
    for (name, _), report in reports.items():
        loss = report["student"]["metrics"]["loss"]
        found[name].append((loss, largest_jump(report["pruning"])))
        for baseline, metrics in report["baselines"].items():
            found[baseline].append((metrics["loss"], None))
    return found


def show(found: Rows, command: str) -> None:
    """The table, and the row for docs/measurements.md."""
    lines, means, spreads = [["variant", "held-out loss", "largest jump"]], [], []
    for name, pairs in found.items():
        loss, deviation = mean_and_deviation([loss for loss, _ in pairs])
        lines.append([name, f"{loss:.3f} ±{deviation:.3f}", _jump([jump for _, jump in pairs])])
        means.append(f"{name} {loss:.3f}")
        spreads.append(f"{name} {deviation:.3f}")
    print(aligned(lines))
    ratios = [
        cubic / one_shot
        for (_, cubic), (_, one_shot) in zip(found["cubic"], found["one_shot"], strict=True)
        if cubic and one_shot
    ]
    means.append("jump of cubic over one_shot " + ", ".join(f"{ratio:.3f}" for ratio in ratios))
    what = "HomoDistil of a pretrained Llama, held-out loss in nats per token"
    print_row(markdown_row(what, command, "; ".join(means), "sd: " + "; ".join(spreads)))


def _jump(jumps: Sequence[float | None]) -> str:
    known = [jump for jump in jumps if jump is not None]
    if not known:
        return "-"
    mean, deviation = mean_and_deviation(known)
    return f"{mean:.3f} ±{deviation:.3f}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True, help="holds lm/ and weights/")
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3], help="separated by commas")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/homodistil_decoder"))
    given = parser.parse_args(arguments)
    given.data, given.out = given.data.resolve(), ROOT / given.out
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
