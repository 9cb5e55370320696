"""Ranks forked from a process that has imported megakd already: a start takes one second, not ten.

All else is as under a launcher: an own process group, environment, arguments and log.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
# What a run imports when it needs it, for a second or two in every process.
_LATE = ("matplotlib.figure", "matplotlib.backends.backend_svg", "peft", "sklearn.metrics")
FORKS.set_forkserver_preload(["megakd.run.main", *_LATE])


def start_rank(command: Sequence[str], *, variables: Mapping[str, str], log: Path) -> BaseProcess:
    """Start a program, and return its process, whose exit code is None until it ends.

    Args:
        command: the path of a Python program and its arguments.
        variables: of the environment, all of them.
        log: the file that takes standard output and standard error.
    """
    process = FORKS.Process(target=_run, args=(list(command), dict(variables), str(log)))
    process.start()
    return process


def _run(command: list[str], variables: dict[str, str], log: str) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    settle_in(variables)
    without_pictures()
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def settle_in(variables: Mapping[str, str]) -> None:
    """Give a forked process its environment, and freeze its inherited objects."""
    os.environ.clear()
    os.environ.update(variables)
    gc.freeze()


def without_fsync() -> None:
    """Leave data to the page cache: no machine dies in a test, and an fsync takes milliseconds."""
    os.fsync = lambda _: None


def without_pictures() -> None:
    """Let runs end without report.html, which takes three seconds to draw."""
    from megakd.run import finished_run

    finished_run._draw = lambda _: None


def leave_modules_alone() -> None:
    """Leave all that has been imported by now out of collections.

    A collection walks over all modules for half a second, and stages collect several times.
    """
    gc.collect()
    gc.freeze()
