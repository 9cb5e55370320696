"""Part of `gpu_day.py`: a case of the kernels, timed with several values of one setting.

The setting is an environment variable of the kernels. Every value has a process of its own, so that
a crash costs one value and memory is that of one value; the processes take turns, so that a clock
that changes does not favour a value.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpu_day.agreement import SMALL
from gpu_day.process import part_parser, say, words
from lib.launching import BENCHMARKS, ROOT

if TYPE_CHECKING:
    import torch

    from bench.cases import Case

TIMED = "timed: "


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.value is not None:
        measure(given)
        return 0
    rounds = [given.values if number % 2 == 0 else given.values[::-1] for number in given.turns]
    by_value: dict[tuple[str, str], list[dict[str, Any]]] = {}
    code = 0
    for value in (value for order in rounds for value in order):
        for row in timed(value, given):
            by_value.setdefault((value, row["case"]), []).append(row)
            code = max(code, int("failed" in row))
        say(numbers_of(by_value, given))
    return code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = part_parser(__doc__)
    parser.add_argument("--variable", required=True, help="an environment variable")
    parser.add_argument("--values", type=words, required=True)
    parser.add_argument("--cases", type=words, required=True)
    parser.add_argument("--rounds", type=int, default=2, help="processes per value")
    parser.add_argument("--value", help="time this value in this process")
    given = parser.parse_args(arguments)
    given.options = list(arguments)
    given.turns = range(1 if given.rehearse else given.rounds)
    return given


def timed(value: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    variables = {given.variable: value}
    if given.rehearse:
        variables["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-u", str(BENCHMARKS), __name__, *given.options, "--value", value]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = [line.removeprefix(TIMED) for line in done.stdout.splitlines() if TIMED in line]
    if done.returncode == 0:
        return [json.loads(line) for line in lines]
    return [{"case": ", ".join(given.cases), "failed": f"exit code {done.returncode}"}]


def numbers_of(
    by_value: dict[tuple[str, str], list[dict[str, Any]]], given: argparse.Namespace
) -> dict[str, Any]:
    rows = []
    for (value, case), rounds in by_value.items():
        row: dict[str, Any] = {"case": case, given.variable: value, **rounds[-1]}
        times = [one["ms"] for one in rounds if "ms" in one]
        if times:
            row["ms"] = statistics.median(times)
            row["ms, by round"] = ", ".join(f"{ms:.4g}" for ms in times)
        rows.append(row)
    return {"the kernels read the setting": is_read(given.variable), "times": rows}


def is_read(variable: str) -> bool:
    """Return whether a variable occurs in the kernels; else all values are the same."""
    sources = (ROOT / "kernels/megakd_kernels").rglob("*.py")
    return any(variable in file.read_text(encoding="utf-8") for file in sources)


def measure(given: argparse.Namespace) -> None:
    import torch

    from bench.cases import cases_for

    device = torch.device("cpu" if given.rehearse else "cuda")
    known = {case.name: case for case in cases_for("cuda")}
    for name in given.cases:
        case = replace(known[name], **SMALL) if given.rehearse else known[name]
        print(f"{TIMED}{json.dumps({'case': name, **times_of(case, device)})}", flush=True)


def times_of(case: Case, device: torch.device) -> dict[str, Any]:
    from functools import partial

    from bench.memory import peak_on_cuda
    from bench.peers import load
    from bench.problem import drop_gradients, make_problem, run
    from bench.timing import Effort, sample_ms

    problem = make_problem(case, device)
    step = partial(run, load("megakd-triton", case), problem)
    drop = partial(drop_gradients, problem)
    value = float(step())  # compiles
    on_gpu = device.type == "cuda"
    effort = Effort(0.5, 10) if on_gpu else Effort(0.0, 1)
    times = sample_ms(step, device, effort, before=drop)
    drop()
    peak = peak_on_cuda(step, device).bytes_ / 1e6 if on_gpu else None
    return {"ms": statistics.median(times), "loss": value, "peak MB": peak}
