"""The quickstart with several seeds: is the student better than `alone` and `direct`, beyond noise?

`python benchmarks methods.quickstart_seeds [--seeds 1,2,3] [--maxidisc] [key=value …]`; teacher,
student and both baselines are trained anew for every seed, into runs/bench/quickstart-<seed>.
`--maxidisc` also tries every assistant of the same grid, with the same teacher, and prints both
scores and times. Started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lib.launching import ROOT, Report, fetch_teacher, seconds_of, trained
from lib.options import integers, parsed, parser_of
from lib.seeds import scores, show, table

CONFIG = Path("launch/examples/quickstart.yaml")
TEACHER_STAGE = "teacher-finetune"


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3], help="separated by commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--maxidisc", action="store_true", help="try every assistant, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parsed(parser, __name__, arguments)
    fetch_teacher()
    reports, others = {}, {}
    for seed in given.seeds:
        reports[seed] = _trained(given, f"quickstart-{seed}", seed, [])
        if given.maxidisc:
            others[seed] = _trained(given, f"quickstart-maxidisc-{seed}", seed, maxidisc())
    show("quickstart", given.command, reports)
    if given.maxidisc:
        print(table({seed: beside(report, others[seed]) for seed, report in reports.items()}))
    return 0


def _trained(given: argparse.Namespace, name: str, seed: int, more: Sequence[str]) -> Any:
    overrides = [*more, *given.overrides, f"seed={seed}"]
    return trained(CONFIG, given.output / name, ranks=given.ranks, overrides=overrides)


def maxidisc() -> list[str]:
    """Return the overrides that make the quickstart's run MaxiDisc, without baselines."""
    method = yaml.safe_load((ROOT / CONFIG).read_text(encoding="utf-8"))["method"]
    # MaxiDisc also trains the target without an assistant.
    method = {key: value for key, value in method.items() if key != "target_may_win"}
    return [f"method={json.dumps(method | {'name': 'maxidisc'})}", "baselines=[]", "alone=null"]


def beside(report: Report, other: Report) -> dict[str, float]:
    """Return the scores and the seconds of MiniDisc and of MaxiDisc.

    The seconds are those of the search and its students: neither teacher nor baselines count.
    """
    score, best = scores(report)["distilled"], scores(other)["distilled"]
    ours, theirs = _search_seconds(report), _search_seconds(other)
    times = {"minidisc s": ours, "maxidisc s": theirs, "share": ours / theirs}
    return {"minidisc": score, "maxidisc": best, "difference": score - best, **times}


def _search_seconds(report: Report) -> float:
    left_out = {TEACHER_STAGE, *report["baselines"]}
    return sum(spent for stage, spent in seconds_of(report).items() if stage not in left_out)
