"""Processes of `gpu_day.py`: run a part within its limit, and read the numbers that it prints.

A part prints its numbers as one line `numbers: {…}`, as often as it likes: the last line counts, so
that a part that is ended keeps what it had measured until then.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil

from lib.launching import ROOT, bench_path, quickstart
from lib.options import parser_of
from megakd.process.files import json_text

NUMBERS, SKIPPED = "numbers: ", "skipped: "
# Time for the tracebacks of a hanging part, and for the system to end its processes.
LAST_WORDS_S, END_S, POLL_S = 3.0, 10.0, 0.05


def part_parser(about: str | None) -> argparse.ArgumentParser:
    parser = parser_of(about)
    parser.add_argument("--folder", type=Path, required=True, help="for everything it writes")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU")
    return parser


def say(numbers: Mapping[str, Any]) -> None:
    print(f"{NUMBERS}{json_text(dict(numbers))}", flush=True)


def skip(reason: str) -> NoReturn:
    print(f"{SKIPPED}{reason}", flush=True)
    sys.exit(0)


def numbers_of(log: str) -> dict[str, Any]:
    """Return the numbers that a part printed last; empty if the part printed none."""
    try:
        return json.loads(last_line(log, NUMBERS) or "{}")
    except json.JSONDecodeError:  # ended in the middle of the line
        return {}


def last_line(log: str, mark: str) -> str:
    lines = [line.removeprefix(mark) for line in log.splitlines() if line.startswith(mark)]
    return lines[-1].strip() if lines else ""


def environment(*, rehearse: bool) -> dict[str, str]:
    """Return the variables of a part's process; a rehearsal hides all GPUs."""
    # The interpreter of Triton is for the parts that ask for it.
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # The root stays away: its folder `kernels` would be taken for Hugging Face's package of that
    # name.
    variables["PYTHONPATH"] = bench_path()
    # A Python process that is aborted prints where it hangs.
    fixed = {"PYTHONFAULTHANDLER": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**variables, **fixed, **(quickstart().ENVIRONMENT if rehearse else {})}


class Limited(NamedTuple):
    """A command, the file of its output, and the seconds after which it is ended."""

    command: Sequence[str]
    log: Path
    limit_s: float


def run_limited(
    commands: Mapping[str, Limited], variables: Mapping[str, str]
) -> Iterator[tuple[str, int | None, float]]:
    """Run commands side by side; yield name, exit code and seconds of each when it has ended.

    Each has a process group of its own, which ends at the limit; the exit code is then None.
    """
    began = time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, one in commands.items():
            one.log.parent.mkdir(parents=True, exist_ok=True)
            with one.log.open("wb") as file:
                running[name] = subprocess.Popen(
                    list(one.command), cwd=ROOT, env=dict(variables), stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
        while running:
            for name, process in list(running.items()):
                code, seconds = process.poll(), time.monotonic() - began
                if code is None and seconds >= commands[name].limit_s:
                    signal_group(process.pid, signal.SIGABRT)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(LAST_WORDS_S)
                elif code is None:
                    continue
                end_tree(process)
                del running[name]
                yield name, code, seconds
            time.sleep(POLL_S)
    finally:
        for process in running.values():
            end_tree(process)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its descendants and its group, and wait until the process has ended."""
    below = list[psutil.Process]()
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    signal_group(process.pid, signal.SIGKILL)
    for other in below:
        # psutil compares start times: a later process with the same number is left alone.
        if other.is_running():
            other.kill()
    try:
        process.kill()
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        # A driver that hangs cannot be interrupted; the other parts must go on.
        print(f"process {process.pid} does not end", file=sys.stderr, flush=True)


def signal_group(leader: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)
