"""Processes of `gpu_day.py`: run a part within its limit, and read the numbers that it prints.

A part prints its numbers as one line `numbers: {…}`. A part may print such a line several times:
the last line counts, so that a part that is ended keeps what it had found until then.
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
from megakd.storage.atomic import json_text

NUMBERS, SKIPPED = "numbers: ", "skipped: "
# Time for the tracebacks of a hanging part, and for the system to end its processes.
LAST_WORDS_S, END_S, POLL_S = 3.0, 10.0, 0.05


class Ended(NamedTuple):
    """The end of a command.

    code: the exit code; None if the command was ended at its limit.
    """

    code: int | None
    seconds: float


def part_parser(about: str | None) -> argparse.ArgumentParser:
    parser = parser_of(about)
    parser.add_argument("--folder", type=Path, required=True, help="for everything it writes")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU")
    return parser


def words(text: str) -> list[str]:
    return text.split(",")


def say(numbers: Mapping[str, Any]) -> None:
    print(f"{NUMBERS}{json_text(dict(numbers))}", flush=True)


def skip(reason: str) -> NoReturn:
    print(f"{SKIPPED}{reason}", flush=True)
    sys.exit(0)


def numbers_of(log: str) -> dict[str, Any]:
    """Return the numbers that a part printed last; empty if the part printed none."""
    last = _last_line(log, NUMBERS)
    try:
        return json.loads(last) if last else {}
    except json.JSONDecodeError:  # ended in the middle of the line
        return {}


def reason_to_skip(log: str) -> str:
    return _last_line(log, SKIPPED)


def tail_of(log: str) -> str:
    lines = [line for line in log.splitlines() if not line.startswith(NUMBERS)]
    return "\n".join(lines[-60:])


def _last_line(log: str, mark: str) -> str:
    lines = [line.removeprefix(mark) for line in log.splitlines() if line.startswith(mark)]
    return lines[-1].strip() if lines else ""


def environment(*, rehearse: bool) -> dict[str, str]:
    """Return the variables of a part's process; a rehearsal hides all GPUs."""
    # The interpreter of Triton is for the parts that ask for it.
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # The root stays away: its folder `kernels` would be found in place of Hugging Face's package
    # of that name.
    variables["PYTHONPATH"] = bench_path()
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**variables, **offline, **(quickstart().ENVIRONMENT if rehearse else {})}


class Limited(NamedTuple):
    """A command, the file of its output, and the seconds after which it is ended."""

    command: Sequence[str]
    log: Path
    limit_s: float


def run_limited(
    commands: Mapping[str, Limited], variables: Mapping[str, str]
) -> Iterator[tuple[str, Ended]]:
    """Run commands side by side, and yield each when it has ended.

    Each has a process group of its own, which ends at the limit.
    """
    began = time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, one in commands.items():
            running[name] = _start(one, variables)
        while running:
            for name, process in list(running.items()):
                code, seconds = process.poll(), time.monotonic() - began
                if code is not None or seconds >= commands[name].limit_s:
                    _end(process)
                    del running[name]
                    yield name, Ended(code, seconds)
            time.sleep(POLL_S)
    finally:
        for process in running.values():
            end_tree(process)


def _start(one: Limited, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    one.log.parent.mkdir(parents=True, exist_ok=True)
    # A Python process that is aborted prints where it hangs.
    env = {**variables, "PYTHONFAULTHANDLER": "1"}
    with one.log.open("wb") as file:
        return subprocess.Popen(
            list(one.command), cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS_S)
    end_tree(process)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its descendants and its group, and wait until the process has ended."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    _signal_group(process.pid, signal.SIGKILL)
    for other in below:
        # psutil compares start times: a later process with the same number is left alone.
        if other.is_running():
            other.kill()
    if process.poll() is None:
        process.kill()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        # A driver that hangs cannot be interrupted; the other parts must go on.
        print(f"process {process.pid} does not end", file=sys.stderr, flush=True)


def _signal_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):
        return
