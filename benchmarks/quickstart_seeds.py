"""The quickstart with several seeds: is the student better than `alone` and `direct`, beyond noise?

`python benchmarks/quickstart_seeds.py [--seeds 1,2,3] [--maxidisc] [key=value …]`; teacher, student
and both baselines are trained anew for every seed, into runs/bench/quickstart-<seed>. `--maxidisc`
also tries every assistant of the same grid, with the same teacher, and prints both scores and
times. Started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from launching import ROOT, fetch_teacher, trained
from machine import mean_and_deviation, print_row
from options import integers
from summary import aligned, row, scores, seconds, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONFIG = Path("launch/examples/quickstart.yaml")
TEACHER_STAGE = "teacher-finetune"
COLUMNS = ("minidisc", "maxidisc", "difference", "minidisc s", "maxidisc s", "share")


def main(arguments: Sequence[str]) -> int:
    """Runs what has not finished, and prints all seeds."""
    given = parse(arguments)
    fetch_teacher()
    reports, others = {}, {}
    for seed in given.seeds:
        reports[seed] = _trained(given, f"quickstart-{seed}", seed, [])
        if given.maxidisc:
            others[seed] = _trained(given, f"quickstart-maxidisc-{seed}", seed, maxidisc(ROOT))
    print(table(reports))
    if given.maxidisc:
        print(against_maxidisc(reports, others))
    command = shlex.join(["python", "benchmarks/quickstart_seeds.py", *arguments])
    print_row(row("quickstart", command, list(reports.values())))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3], help="separated by commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--maxidisc", action="store_true", help="try every assistant, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def _trained(given: argparse.Namespace, name: str, seed: int, own: Sequence[str]) -> dict[str, Any]:
    overrides = [*own, *given.overrides, f"seed={seed}"]
    return trained(CONFIG, given.output / name, ranks=given.ranks, overrides=overrides)


def maxidisc(root: Path) -> list[str]:
    """Return the overrides that make the quickstart's run MaxiDisc, without baselines."""
    method = yaml.safe_load((root / CONFIG).read_text(encoding="utf-8"))["method"]
    # MaxiDisc also trains the target without an assistant.
    kept = {key: value for key, value in method.items() if key != "target_may_win"}
    return [f"method={json.dumps(kept | {'name': 'maxidisc'})}", "baselines=[]", "alone=null"]


def against_maxidisc(
    reports: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]]
) -> str:
    """Return MiniDisc's and MaxiDisc's scores and seconds by seed, with their means and deviations.

    The seconds are those of the search and its students: neither teacher nor baselines count.
    """
    lines = {str(seed): _beside(reports[seed], others[seed]) for seed in reports}
    columns = list(zip(*lines.values(), strict=True))
    for index, name in enumerate(("mean", "sd")):
        lines[name] = [mean_and_deviation(column)[index] for column in columns]
    cells = [[name, *(f"{value:.4g}" for value in line)] for name, line in lines.items()]
    return aligned([["seed", *COLUMNS], *cells])


def _beside(report: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
    score, best = scores(report)["distilled"], scores(other)["distilled"]
    ours, theirs = _search_seconds(report), _search_seconds(other)
    return [score, best, score - best, ours, theirs, ours / theirs]


def _search_seconds(report: Mapping[str, Any]) -> float:
    left_out = {TEACHER_STAGE, *report["baselines"]}
    return sum(spent for stage, spent in seconds(report).items() if stage not in left_out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
