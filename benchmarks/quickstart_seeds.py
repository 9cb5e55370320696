"""The quickstart with several seeds: is the student better than `alone` and `direct`, beyond noise?

`python benchmarks/quickstart_seeds.py [--seeds 1,2,3] [key=value …]`; teacher, student and
both baselines are trained anew for every seed, into runs/bench/quickstart-<seed>. Started again it
goes on where it was.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launching import fetch_teacher, trained
from machine import print_row
from options import integers
from summary import row, table

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIG = Path("launch/examples/quickstart.yaml")


def main(arguments: Sequence[str]) -> int:
    """Runs what has not finished, and prints all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3], help="separated by commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args(arguments)
    fetch_teacher()
    reports = {}
    for seed in given.seeds:
        output = given.output / f"quickstart-{seed}"
        overrides = [*given.overrides, f"seed={seed}"]
        reports[seed] = trained(CONFIG, output, ranks=given.ranks, overrides=overrides)
    print(table(reports))
    command = shlex.join(["python", "benchmarks/quickstart_seeds.py", *arguments])
    print_row(row("quickstart", command, list(reports.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
