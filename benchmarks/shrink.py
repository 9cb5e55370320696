"""Shrink on a real pretrained decoder: choice in one trial against trying each candidate.

`python benchmarks/shrink.py --data FOLDER [--seeds 1,2,3]`, on the CPU, one rank.

The teacher is a Llama of 260,000 weights, pretrained on TinyStories by the author of llama2.c. The
student has 0.4 of its weights. `shrink` chooses among all candidates in a trial and repairs the
best one. `tried` trains every candidate alone, for as many steps as a candidate takes in `shrink`,
and takes the best on the same held-out rows. `random` is the shape of the student from random
weights, distilled for as many steps. `cut` is the student before its first step, and `trial` is the
student after the trial, before the repair. `on policy` spends the last tenth of the repair on texts
that the student generates. Each run has a folder below `--out`, is gone on with where it was, and
is done once; `--runs` takes some of them. `--hops` runs only one hop to a quarter of the weights,
and two hops through an assistant, at equal numbers of steps.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launching import ROOT, write_config
from legs import Leg, finished, run_side_by_side
from machine import markdown_row, mean_and_deviation, print_row
from options import integers
from stories_tokenizer import write_tokenizer
from summary import aligned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STORIES = Path("lm/tinystories_sample/tinystories_1000.json")
MODEL = Path("weights/stories260K")
LAYERS = 5
DEPTHS = (5, 4, 3, 2)
"""Numbers of layers of the candidates; the student does not fit into fewer layers."""
SHARE = 0.6
"""Share of the teacher's weights to remove."""
ON_POLICY = 10
"""`on policy` takes one of this many steps of the repair on generated texts."""


class Scores(NamedTuple):
    """Held-out losses of one seed, in nats per token.

    alone: by number of layers, each candidate that was trained alone; empty if not all were.
    chosen: layers of the candidate that the trial chose.
    trial_seconds, alone_seconds: time of the trial, and of training all candidates.
    """

    teacher: float
    shrink: float
    random: float
    cut: float
    trial: float
    chosen: int
    alone: Mapping[int, float]
    on_policy: float | None
    trial_seconds: float
    alone_seconds: float

    @property
    def tried(self) -> float | None:
        """The loss of the best candidate that was trained alone."""
        return min(self.alone.values(), default=None)

    @property
    def is_best(self) -> bool | None:
        """Whether the trial chose the candidate that is the best alone."""
        if not self.alone:
            return None
        return self.chosen == min(self.alone, key=lambda layers: self.alone[layers])


def main(arguments: Sequence[str]) -> int:
    """Runs what has not finished, and prints the table."""
    given = parse(arguments)
    for path in (given.data / STORIES, given.data / MODEL):
        if not path.exists():
            print(f"shrink: error: {path} does not exist", file=sys.stderr)
            return 1
    write_tokenizer(given.data / MODEL / "tok512.bin", given.out / "tokenizer")
    write_config(given.out / "run.yaml", config(given))
    legs = [leg(given, name, seed) for seed in given.seeds for name in given.runs]
    run_side_by_side(legs, jobs=given.jobs)
    command = shlex.join(["python", "benchmarks/shrink.py", *arguments])
    if given.hops:
        show_hops(given, command)
        return 0
    done = [found for seed in given.seeds if (found := scores(given, seed)) is not None]
    if done:
        show(done, command)
    return 0


def config(given: argparse.Namespace) -> dict[str, Any]:
    """The run that the variants change."""
    return {
        "output_dir": str(given.out / "run"),
        "task": {
            "type": "causal_lm",
            "dataset": str(given.data / STORIES),
            "text_columns": ["text"],
            "max_length": 256,
            "tokenizer": str(given.out / "tokenizer"),
            "max_eval_examples": 16,
        },
        "teacher": {"model": str(given.data / MODEL / "hf"), "deepspeed": "teacher_zero0"},
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {
            "name": "shrink",
            "target_sparsity": SHARE,
            "candidates": [layers / LAYERS for layers in DEPTHS],
            "trial_steps": given.trial,
            "repair_steps": given.steps,
        },
        "train": {
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "warmup_ratio": 0.02,
        },
        "log": {"logging_steps": 50},
    }


def hop_variants(given: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Overrides of the runs to a quarter of the weights, which take equal numbers of steps."""
    far = ("method.target_sparsity=0.75", "method.candidates=6")
    half = given.steps // 2
    return {
        "one_hop": (*far, f"method.repair_steps={2 * half + given.trial}"),
        "two_hops": (*far, f"method.repair_steps={half}", "method.assistant=auto_2.5"),
    }


def variants(given: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Overrides of the run by the name of the variant."""
    if given.hops:
        return hop_variants(given)
    last = max(1, given.steps // ON_POLICY)
    on_policy = (
        f"method.repair_steps={given.steps - last}",
        f"method.on_policy_steps={last}",
        "rollout={max_new_tokens: 96, prompt_tokens: 32}",
    )
    alone = {f"layers-{layers}": (f"method.candidates=[{layers / LAYERS}]",) for layers in DEPTHS}
    return {"shrink": ("baselines=[random]",), **alone, "on_policy": on_policy}


def leg(given: argparse.Namespace, name: str, seed: int) -> Leg:
    """One run."""
    folder, overrides = f"{name}-{seed}", variants(given)[name]
    return Leg(folder, given.out / "run.yaml", given.out / folder, (*overrides, f"seed={seed}"))


def scores(given: argparse.Namespace, seed: int) -> Scores | None:
    """The losses of a seed from the reports of its runs; None without the report of `shrink`."""
    names = variants(given)
    reports = {name: finished(leg(given, name, seed)) for name in names}
    report = reports["shrink"]
    if report is None:
        return None
    (chosen,) = [row for row in report["candidates"] if row["chosen"]]
    layers = int(chosen["shape"].split()[0])
    trial = stage(report, "trial-1")
    alone = {layers: reports[f"layers-{layers}"] for layers in DEPTHS}
    tried = {n: found for n, found in alone.items() if found is not None}
    tried = tried if len(tried) == len(DEPTHS) else {}
    on_policy = reports["on_policy"]
    return Scores(
        teacher=report["teacher"]["metrics"]["loss"],
        shrink=report["student"]["metrics"]["loss"],
        random=report["baselines"]["random"]["loss"],
        cut=cut_loss(given.out / f"shrink-{seed}" / "metrics.jsonl", layers),
        trial=trial["metrics"]["loss"],
        chosen=layers,
        alone={n: found["student"]["metrics"]["loss"] for n, found in tried.items()},
        on_policy=None if on_policy is None else on_policy["student"]["metrics"]["loss"],
        trial_seconds=trial["seconds"],
        alone_seconds=sum(seconds_of(found) for found in tried.values()),
    )


def stage(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A stage of a report."""
    return next(one for one in report["stages"] if one["name"] == name)


def seconds_of(report: Mapping[str, Any]) -> float:
    """The time that a run has trained."""
    return sum(stage(report, name)["seconds"] for name in ("trial-1", "student"))


def cut_loss(metrics: Path, layers: int) -> float:
    """The loss of a candidate before its first step, from the log of a run."""
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    key = f"eval/layers-{layers}/loss"
    return next(line[key] for line in lines if line["stage"] == "trial-1" and key in line)


def show(found: Sequence[Scores], command: str) -> None:
    """The table, and the row for docs/measurements.md."""
    named: dict[str, list[float | None]] = {
        name: [getattr(one, name) for one in found]
        for name in ("teacher", "shrink", "tried", "on_policy", "random", "trial", "cut")
    }
    named |= {f"layers-{n} alone": [one.alone.get(n) for one in found] for n in DEPTHS}
    lines, means, spreads = [["variant", "held-out loss", "seeds"]], [], []
    for name, values in named.items():
        known = [value for value in values if value is not None]
        if not known:
            continue
        mean, deviation = mean_and_deviation(known)
        lines.append([name, f"{mean:.4f} ±{deviation:.4f}", str(len(known))])
        means.append(f"{name} {mean:.4f}")
        spreads.append(f"{name} {deviation:.4f}")
    print(aligned(lines))
    right = [one.is_best for one in found if one.is_best is not None]
    means.append(f"the trial chose {', '.join(str(one.chosen) for one in found)} layers")
    if right:
        means.append(f"the best candidate alone in {sum(right)} of {len(right)} seeds")
    seconds = [(one.trial_seconds, one.alone_seconds) for one in found if one.alone]
    means += [f"trial {trial:.0f} s, all alone {alone:.0f} s" for trial, alone in seconds]
    what = "Shrink of a pretrained Llama to 0.4 of its weights, held-out loss in nats per token"
    print_row(markdown_row(what, command, "; ".join(means), "sd: " + "; ".join(spreads)))


def show_hops(given: argparse.Namespace, command: str) -> None:
    """Print the losses of one hop and of two hops, and the row for docs/measurements.md."""
    means, spreads = [], []
    for name in hop_variants(given):
        reports = [finished(leg(given, name, seed)) for seed in given.seeds]
        losses = [r["student"]["metrics"]["loss"] for r in reports if r is not None]
        if losses:
            mean, deviation = mean_and_deviation(losses)
            means.append(f"{name} {mean:.4f} ({len(losses)} seeds)")
            spreads.append(f"{name} {deviation:.4f}")
    what = "Shrink of a pretrained Llama to a quarter of its weights, held-out loss"
    print_row(markdown_row(what, command, "; ".join(means), "sd: " + "; ".join(spreads)))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True, help="holds lm/ and weights/")
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3], help="separated by commas")
    parser.add_argument("--steps", type=int, default=400, help="of the repair")
    parser.add_argument("--trial", type=int, default=60, help="steps of the trial")
    parser.add_argument("--runs", nargs="*", help="names of the variants; default: all")
    parser.add_argument("--hops", action="store_true", help="compare one hop with two")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; default: 1")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/shrink"))
    given = parser.parse_args(arguments)
    given.data, given.out = given.data.resolve(), ROOT / given.out
    given.runs = given.runs or [*variants(given)]
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
