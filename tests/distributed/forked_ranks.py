"""Ranks forked from a process that has imported megakd already: a start takes one second, not ten.

All else is as under a launcher: an own process group, environment, arguments and log.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["megakd.run.main"])


def start_rank(command: Sequence[str], *, variables: Mapping[str, str], log: Path) -> BaseProcess:
    """Start a program, and return its process, whose exit code is None until it ends.

    Args:
        command: the path of a Python program and its arguments.
        variables: of the environment.
        log: the file that takes standard output and standard error.
    """
    process = _CONTEXT.Process(target=_run, args=(list(command), dict(variables), str(log)))
    process.start()
    return process


def _run(command: list[str], variables: dict[str, str], log: str) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.environ.update(variables)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
