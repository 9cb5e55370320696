"""Real runs on real data: teacher, distilled student, and the same student alone.

`python benchmarks/real_runs.py sst2 | mrpc | stories | books [--seeds 1,2] [key=value …]`, by
default on two CPU ranks under DeepSpeed's launcher. Reads ../shared/data, writes
runs/bench/<name>/seed-<n>; started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launching import ROOT, trained, write_config
from machine import print_row
from options import integers
from real_cases import CASES
from summary import row, table

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Runs what has not finished, and prints all seeds."""
    given = parse(arguments)
    case, folder = CASES[given.name], given.output / given.name
    if not (ROOT / case.data).exists():
        print(f"real_runs: error: {case.data} does not exist", file=sys.stderr)
        return 1
    case.prepare(folder)
    path = folder / "run.yaml"
    # Every seed gives its own folder on the command line.
    write_config(ROOT / path, {"output_dir": str(folder / "run"), **case.config(folder)})
    reports = {}
    for seed in given.seeds:
        output = folder / f"seed-{seed}"
        overrides = [*given.overrides, f"seed={seed}"]
        reports[seed] = trained(path, output, ranks=given.ranks, overrides=overrides)
    print(table(reports))
    command = shlex.join(["python", "benchmarks/real_runs.py", *arguments])
    print_row(row(f"{case.what}, {given.ranks} rank(s)", command, list(reports.values())))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(CASES))
    parser.add_argument("--seeds", type=integers, default=[1], help="separated by commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
