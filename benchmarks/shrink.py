"""Shrink of a decoder: choice in one trial against trying each candidate.

`python benchmarks/shrink.py --data FOLDER [--case stories | books] [--seeds 1,2,3]`, on the CPU,
one rank.

The teacher of `stories` is a Llama of 260,000 weights, pretrained on TinyStories by the author of
llama2.c. The teacher of `books` is a Llama of 1.5 million weights that is first trained on eleven
novels, once. The student has 0.4 of the weights of its teacher.

`shrink` chooses among all candidates in a trial and repairs the best one. `tried` trains every
candidate alone, for as many steps as a candidate takes in `shrink`, and takes the best on the same
held-out rows. `random` is the shape of the student from random weights, distilled for as many
steps. `cut` is the student before its first step, and `trial` is the student after the trial,
before the repair. `on policy` spends the last tenth of the repair on texts that the student
generates. Each run has a folder below `--out`, is gone on with where it was, and is done once;
`--runs` takes some of them. `--hops` runs only one hop of the stories' Llama to a quarter of the
weights, and two hops through an assistant, at equal numbers of steps. `--trials` runs only trials
of several lengths, with one step of repair, and prints which candidate they choose.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from books_case import TEACHER
from given_data import is_incomplete
from launching import ROOT, write_config
from legs import Leg, finished, run_side_by_side
from machine import markdown_row, mean_and_deviation, print_row
from options import integers, positive
from shrink_cases import CASES, ShrinkCase
from shrink_summary import (
    ALONE,
    Scores,
    divergences_line,
    divergences_of,
    scores_of,
    show,
    stock_class,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

ON_POLICY = 10
"""`on policy` takes one of this many steps of the repair on generated texts."""


def main(arguments: Sequence[str]) -> int:
    """Runs what has not finished, and prints the table."""
    given = parse(arguments)
    case = case_of(given)
    if is_incomplete("shrink", (given.data / part for part in case.parts)):
        return 1
    case.prepare(given)
    write_config(given.out / "run.yaml", config(given))
    legs = [leg(given, name, seed) for seed in given.seeds for name in given.runs]
    run_side_by_side(legs, jobs=given.jobs)
    command = shlex.join(["python", "benchmarks/shrink.py", *arguments])
    if given.hops:
        show_hops(given, command)
    elif given.trials:
        show_trials(given, command)
    else:
        show_seeds(given, command)
    return 0


def case_of(given: argparse.Namespace) -> ShrinkCase:
    """Return the teacher that is cut, with its text."""
    return CASES[given.case]


def config(given: argparse.Namespace) -> dict[str, Any]:
    """The run that the variants change."""
    case = case_of(given)
    return {
        "output_dir": str(given.out / "run"),
        **case.sections(given),
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {
            "name": "shrink",
            "target_sparsity": case.sparsity,
            "candidates": [layers / case.layers for layers in case.depths],
            "trial_steps": given.trial,
            "repair_steps": given.steps,
        },
        "train": dict(case.train),
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


def trial_variants(given: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Overrides of the runs that compare lengths of the trial."""
    once = "method.repair_steps=1"
    return {f"trial-{steps}": (f"method.trial_steps={steps}", once) for steps in given.trials}


def variants(given: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Overrides of the run by the name of the variant."""
    if given.hops:
        return hop_variants(given)
    if given.trials:
        return trial_variants(given)
    last = max(1, given.steps // ON_POLICY)
    on_policy = (
        f"method.repair_steps={given.steps - last}",
        f"method.on_policy_steps={last}",
        "rollout={max_new_tokens: 96, prompt_tokens: 32}",
    )
    case = case_of(given)
    alone = {f"{ALONE}{n}": (f"method.candidates=[{n / case.layers}]",) for n in case.depths}
    return {"shrink": ("baselines=[random]",), **alone, "on_policy": on_policy}


def leg(given: argparse.Namespace, name: str, seed: int) -> Leg:
    """One run."""
    folder, overrides = f"{name}-{seed}", variants(given)[name]
    return Leg(folder, given.out / "run.yaml", given.out / folder, (*overrides, f"seed={seed}"))


def scores(given: argparse.Namespace, seed: int) -> Scores | None:
    """The losses of a seed from the reports of its runs; None without the report of `shrink`."""
    reports = {name: finished(leg(given, name, seed)) for name in variants(given)}
    metrics = leg(given, "shrink", seed).output / "metrics.jsonl"
    return scores_of(reports, case_of(given).depths, metrics)


def show_seeds(given: argparse.Namespace, command: str) -> None:
    """Print the losses of the seeds whose `shrink` has finished, and open their students."""
    found = {seed: scores(given, seed) for seed in given.seeds}
    known = {seed: one for seed, one in found.items() if one is not None}
    if not known:
        return
    finals = (leg(given, "shrink", seed).output / "final" for seed in known)
    opened = f"final/ opens as {', '.join(sorted({stock_class(folder) for folder in finals}))}"
    case = case_of(given)
    what = f"Shrink of {case.what} to {1 - case.sparsity:g} of its weights, held-out loss in nats"
    show([*known.values()], f"{what} per token", command, [opened])


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


def show_trials(given: argparse.Namespace, command: str) -> None:
    """Print the candidates that trials of several lengths chose, as a row for the measurements."""
    parts = []
    for name in trial_variants(given):
        reports = [finished(leg(given, name, seed)) for seed in given.seeds]
        found = [divergences_of(report) for report in reports if report is not None]
        layers = ", ".join(str(min(kl, key=lambda n, kl=kl: kl[n])) for kl in found)
        parts.append(f"{name}: {layers} layers ({'; '.join(map(divergences_line, found))})")
    case = case_of(given)
    what = f"Choices of trials of several lengths, {case.what} to {1 - case.sparsity:g}"
    print_row(markdown_row(what, command, "; ".join(parts), f"{len(given.seeds)} seeds"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True, help="holds lm/ and weights/")
    parser.add_argument("--case", choices=CASES, default="stories")
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3], help="separated by commas")
    parser.add_argument("--steps", type=int, default=400, help="of the repair")
    parser.add_argument("--trial", type=int, default=60, help="steps of the trial")
    parser.add_argument("--runs", nargs="*", help="names of the variants; default: all")
    parser.add_argument("--hops", action="store_true", help="compare one hop with two")
    parser.add_argument("--trials", type=integers, help="compare trials of so many steps")
    parser.add_argument("--jobs", type=positive, default=1, help="runs side by side; default: 1")
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="folder of books' teacher")
    parser.add_argument("--out", type=Path, help="default: below runs/bench/shrink")
    given = parser.parse_args(arguments)
    if given.hops and given.case != "stories":
        parser.error("--hops: the embeddings of books' teacher are too large for a quarter")
    given.data, given.teacher = given.data.resolve(), ROOT / given.teacher
    given.out = ROOT / (given.out or Path("runs/bench/shrink") / CASES[given.case].out)
    given.runs = given.runs or [*variants(given)]
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
