"""Time of a run beside its training: start, data, models, scoring, latency and report.

`python benchmarks speed.outside_training [--against CHECKOUT] [--pairs 3] [key=value …]` trains the
`stories` case of real_runs.py for 40 steps on one CPU rank, each time into a new folder, in turns
with the same run of another checkout of megakd. A first run of each is not counted: that run
compiles DeepSpeed's extension and fills the caches. The seconds outside training are the
wall-clock of the command without the seconds of the report's stages.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lib.launching import ROOT, code_of
from lib.options import parsed, parser_of
from lib.tables import print_rows
from methods.real_runs import written

FOLDER = Path("runs/bench/outside-training")
STEPS = ("train.max_steps=40", "eval.eval_steps=20", "save.save_steps=20")


class Spent(NamedTuple):
    """Seconds of one run: in its stages, beside them, and of all processors together."""

    training: float
    outside: float
    cpu: float


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of megakd")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parsed(parser, __name__, arguments)
    config = ROOT / written("stories", FOLDER)
    checkouts = {"this": ROOT} | ({"other": given.against.resolve()} if given.against else {})
    spent: dict[str, list[Spent]] = {name: [] for name in checkouts}
    for pair in range(given.pairs + 1):
        for name, checkout in checkouts.items():
            seconds = run_once(checkout, config, given.overrides)
            print(f"{name} {pair or 'uncounted'}: {seconds}", flush=True)
            spent[name] += [seconds] if pair else []
    print_rows(given.command, row(spent))
    return 0


def run_once(checkout: Path, config: Path, overrides: Sequence[str]) -> Spent:
    output = ROOT / FOLDER / "run"
    shutil.rmtree(output, ignore_errors=True)
    script = [sys.executable, str(checkout / "launch/train.py"), "--config", str(config)]
    command = [*script, f"output_dir={output}", *STEPS, *overrides]
    before, cpu = time.perf_counter(), _cpu_seconds()
    subprocess.run(command, cwd=ROOT, env=code_of(checkout), check=True, capture_output=True)
    whole, cpu = time.perf_counter() - before, _cpu_seconds() - cpu
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    print({name: round(value, 1) for name, value in report.get("seconds", {}).items()})
    training = sum(stage["seconds"] for stage in report["stages"])
    return Spent(round(training, 1), round(whole - training, 1), round(cpu, 1))


def row(spent: dict[str, list[Spent]]) -> tuple[str, str, str]:
    numbers = "; ".join(
        f"{name}: {statistics.median(run.outside for run in runs):.1f} s outside "
        f"{statistics.median(run.training for run in runs):.1f} s of training, "
        f"CPU {statistics.median(run.cpu for run in runs):.1f} s"
        for name, runs in spent.items()
    )
    spread = "; ".join(f"{name}: {[run.outside for run in runs]}" for name, runs in spent.items())
    return "seconds outside training", numbers, spread


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
