"""MiniDisc on docstrings over several seeds: teacher, student, `direct`, and the student alone.

`python benchmarks methods.minidisc [--seeds 1,2] [key=value …]`, by default on two CPU ranks
under DeepSpeed's launcher, about five minutes each. Writes runs/bench/minidisc/seed-<n>; started
again it goes on where it was. The teacher is trained anew for every seed. `--maxidisc` also tries
every assistant of the same grid, with the same teacher.
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
from lib.tables import Columns, print_models

CONFIG = Path("launch/examples/pydocs_minidisc.yaml")


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    fetch_teacher()
    models: dict[str, Columns] = {}
    for seed in given.seeds:
        of_seed = numbers(_trained(given, "minidisc", seed, ()))
        if given.maxidisc:
            best = numbers(_trained(given, "maxidisc", seed, maxidisc()))
            of_seed["maxidisc"] = best["distilled"]
        for name, columns in of_seed.items():
            for title, value in columns.items():
                models.setdefault(name, {}).setdefault(title, {})[seed] = value
    print_models(f"minidisc, {given.ranks} rank(s)", given.command, models, reference="distilled")
    return 0


def _trained(given: argparse.Namespace, name: str, seed: int, more: Sequence[str]) -> Any:
    overrides = [*more, *given.overrides, f"seed={seed}"]
    output = given.output / name / f"seed-{seed}"
    return trained(CONFIG, output, ranks=given.ranks, overrides=overrides)


def numbers(report: Report) -> dict[str, dict[str, float]]:
    """Return the headline metric of all models, and the student's sizes and times.

    The seconds of the search are those of importance, trials and students: neither teacher nor
    baselines count.
    """
    metrics = {model: report[model]["metrics"] for model in ("teacher", "student")}
    metrics |= report["baselines"]
    models = {model: {"score": one[report["metric_name"]]} for model, one in metrics.items()}
    left_out, seconds = {"teacher-finetune", *report["baselines"]}, seconds_of(report)
    models["distilled"] = models.pop("student") | {
        "parameters": report["student"]["parameters"],
        "seconds": sum(seconds.values()),
        "of the search": sum(spent for stage, spent in seconds.items() if stage not in left_out),
    }
    return models


def maxidisc() -> list[str]:
    method = yaml.safe_load((ROOT / CONFIG).read_text(encoding="utf-8"))["method"]
    # MaxiDisc also trains the target without an assistant.
    method = {key: value for key, value in method.items() if key != "target_may_win"}
    return [f"method={json.dumps(method | {'name': 'maxidisc'})}", "baselines=[]", "alone=null"]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=integers, default=[1], help="separated by commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--maxidisc", action="store_true", help="try every assistant, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parsed(parser, __name__, arguments)
