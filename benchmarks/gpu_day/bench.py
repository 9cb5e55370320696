"""Part of `gpu_day.py`: some cases of `python -m bench`, with the promises that they keep."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_day.process import part_parser, say
from lib.launching import ROOT

COLUMNS = {
    "case": "case", "impl": "implementation", "ms_median": "ms", "ms_p20": "20 %",
    "ms_p80": "80 %", "noise": "noise", "frac_of_floor": "share of the floor",
    "tflops_model": "TFLOP/s", "gbps": "GB/s", "peak_mb": "peak MB",
    "loss_relerr": "error of the loss", "dx_relerr": "of dX", "dw_relerr": "of dW",
    "clock": "MHz", "reason": "not measured, because",
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = part_parser(__doc__)
    parser.add_argument("--cases", required=True, help="separated by commas")
    parser.add_argument("--implementations", required=True, help="separated by commas")
    given = parser.parse_args(arguments)
    command = [sys.executable, "-m", "bench", "--out", str(given.folder)]
    command += [word for case in given.cases.split(",") for word in ("--case", case)]
    command += [word for name in given.implementations.split(",") for word in ("--impl", name)]
    # The quick way measures for a shorter time, and takes all cases that are named.
    command += ["--device", "cpu", "--quick"] if given.rehearse else []
    with subprocess.Popen(command, cwd=ROOT / "kernels") as process:
        while process.poll() is None:
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                # A case that hangs must not hide the others.
                say({"rows": rows_of(given.folder)})
    promises = [] if given.rehearse else promises_of(given.folder)
    say({"rows": rows_of(given.folder), "promises": promises})
    return process.returncode


def rows_of(folder: Path) -> list[dict[str, Any]]:
    # Without a last line that is still being written.
    files = (file.read_text(encoding="utf-8").split("\n")[:-1] for file in folder.glob("*.jsonl"))
    records = [json.loads(line) for lines in files for line in lines]
    return [{title: row.get(key) for key, title in COLUMNS.items()} for row in records]


def promises_of(folder: Path) -> list[dict[str, Any]]:
    from bench.results import read
    from bench.targets import verdicts

    rows = [row for file in folder.glob("*.jsonl") for row in read(file)]
    told = (verdict for verdict in verdicts(rows, "cuda") if verdict.holds is not None)
    return [verdict._asdict() for verdict in told]
