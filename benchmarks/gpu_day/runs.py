"""Part of `gpu_day.py`: a whole run under DeepSpeed's launcher, killed in the middle and resumed.

Every case trains once without interruption, and once with a SIGKILL to all processes after the
checkpoint at half of the steps. The weights of both students must have the same bits. If they
differ, the uninterrupted run is repeated: a GPU whose sums depend on the order of its threads does
not repeat itself either, and the differences are reported instead.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu_day import cases as gpu_day_cases
from gpu_day.process import end_tree, part_parser, say
from lib.launching import ROOT, RunFailedError, under_launcher, write_config

POLL_S, TRIES = 0.01, 3
LEGS = ("first", "resumed", "repeated")


class Case(NamedTuple):
    """A run config, and the stage in which the run is killed."""

    tree: Callable[..., dict[str, Any]]
    stage: str


CASES = {
    "causal_lm": Case(gpu_day_cases.causal_lm_tree, "student"),
    "minidisc": Case(gpu_day_cases.minidisc_tree, "trial-1"),
    "billion": Case(gpu_day_cases.billion_tree, "trial-1"),
}


def main(arguments: Sequence[str]) -> int:
    parser = part_parser(__doc__)
    parser.add_argument("case", choices=CASES)
    given = parser.parse_args(arguments)
    tree = CASES[given.case].tree(given.folder, rehearse=given.rehearse)
    config = write_config(given.folder / "run.yaml", tree)
    numbers: dict[str, Any] = {"plan": planned(config)}
    try:
        run_all(config, given, numbers)
    except RunFailedError as error:
        print(f"gpu_day_runs: error: {error}", file=sys.stderr, flush=True)
        return 1
    for leg in LEGS:  # models and checkpoints of gigabytes
        shutil.rmtree(given.folder / leg, ignore_errors=True)
    return int(not numbers["same bits"] and numbers.get("repeated: same bits", True))


def run_all(config: Path, given: Namespace, numbers: dict[str, Any]) -> None:
    first, resumed, repeated = (given.folder / leg for leg in LEGS)
    legs: list[dict[str, Any]] = []
    numbers |= {"seconds": legs, **whole_run(config, first, given, legs)}
    say(numbers)
    numbers["killed after step"] = kill_in_the_middle(config, resumed, given, legs)
    say(numbers)
    whole_run(config, resumed, given, legs)
    numbers |= differences(first, resumed)
    say(numbers)
    if not numbers["same bits"]:
        whole_run(config, repeated, given, legs)
        again = differences(first, repeated).items()
        numbers |= {f"repeated: {key}": value for key, value in again}
        say(numbers)


def planned(config: Path) -> list[dict[str, Any]]:
    """Return the peak of every phase as `megakd plan` prints it before the run."""
    command = [sys.executable, "-m", "megakd", "plan", str(config), "--ranks", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return [{"not planned, because": done.stderr.strip().splitlines()[-1]}]
    return [
        {"phase": phase["name"], "planned MB": phase["peak_bytes_per_rank"] / 1e6}
        for phase in json.loads(done.stdout)["phases"]
    ]


def whole_run(
    config: Path, output: Path, given: Namespace, legs: list[dict[str, Any]]
) -> dict[str, Any]:
    began = time.monotonic()
    with start(config, output, given) as process:
        code = process.wait()
    report = output / "report.json"
    # The launcher also returns 0 when a rank was killed by a signal.
    if code != 0 or not report.is_file():
        raise RunFailedError(f"{output.name}: exit code {code}, and {report} does not exist")
    legs.append({"run": output.name, "seconds": time.monotonic() - began})
    return report_numbers(json.loads(report.read_text(encoding="utf-8")))


def kill_in_the_middle(
    config: Path, output: Path, given: Namespace, legs: list[dict[str, Any]]
) -> int:
    """Kill all processes of a run after its checkpoint at half of the steps.

    Return the step of the newest checkpoint.
    """
    case, step = CASES[given.case], 0
    steps = case.tree(given.folder, rehearse=given.rehearse)["train"]["max_steps"]
    folder = output / "checkpoints" / case.stage
    for _ in range(TRIES):
        shutil.rmtree(output, ignore_errors=True)
        began = time.monotonic()
        with start(config, output, given) as process:
            while newest_step(folder) < steps // 2 and process.poll() is None:
                time.sleep(POLL_S)
            end_tree(process)
        step = newest_step(folder)
        legs.append({"run": "killed", "seconds": time.monotonic() - began})
        # On a busy machine, a short stage may be over, and its checkpoints removed, before this
        # process has seen them.
        if 0 < step < steps:
            break
    if not steps // 2 <= step < steps:
        raise RunFailedError(f"the newest checkpoint of the killed run is of step {step}")
    return step


def newest_step(folder: Path) -> int:
    """Return the step of the newest whole checkpoint; 0 if there is none."""
    # A folder that is still being written has another name.
    names = (re.fullmatch(r"step-(\d+)", p.parent.name) for p in folder.glob("*/checksums.json"))
    return max((int(name[1]) for name in names if name), default=0)


def start(config: Path, output: Path, given: Namespace) -> subprocess.Popen[bytes]:
    script = ["launch/train.py", "--config", str(config), f"output_dir={output}"]
    return subprocess.Popen(under_launcher(script, 1, on_cpu=given.rehearse), cwd=ROOT)


def report_numbers(report: dict[str, Any]) -> dict[str, Any]:
    stages = [
        {
            "stage": stage["name"],
            "steps": stage["steps"],
            "seconds": stage["seconds"],
            "tokens/s": stage["tokens_per_second"],
            "peak MB": stage["peak_memory_bytes"] / 1e6,
        }
        for stage in report["stages"]
    ]
    scores = [
        {"model": name, **{metric: report[f"{name}.{metric}"] for metric in report["metrics"]}}
        for name in report["models"]
        if name in ("teacher", "student")
    ]
    spent = [
        {"phase": key.removeprefix("seconds."), "seconds": value}
        for key, value in report.items()
        if key.startswith("seconds.")
    ]
    return {"stages": stages, "scores": scores, "phases": spent}


def differences(one: Path, other: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    files = [folder / "final" / "model.safetensors" for folder in (one, other)]
    if files[0].read_bytes() == files[1].read_bytes():
        return {"same bits": True, "largest difference of a weight": 0.0}
    left, right = (load_file(file) for file in files)
    largest = max((left[name].double() - right[name].double()).abs().max().item() for name in left)
    return {"same bits": False, "largest difference of a weight": largest}
