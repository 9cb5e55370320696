"""Work in several processes: in order, and over with the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megakd.errors import DataError, MegakdError
from megakd.process.workers import in_processes

WAIT_S = 30
PARENT = """
import os, time
from megakd.process.workers import in_processes
made = in_processes(lambda n: (os.getpid(), b"x" * 200_000), range(1000), 2)
print(next(made)[0], next(made)[0], flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("processes", [1, 3])
def test_results_are_yielded_in_order(processes):
    made = in_processes(lambda n: n * n, range(10), processes)

    assert list(made) == [n * n for n in range(10)]


def test_a_process_that_ends_early_is_an_error():
    made = in_processes(lambda n: os._exit(3) if n == 3 else n, range(10), 2)

    with pytest.raises(MegakdError, match="one of 2 processes that encode rows ended early"):
        list(made)


def test_an_error_of_a_row_is_that_of_one_process():
    def refusing(number: int) -> int:
        if number == 3:
            raise DataError("row 3 has no text")
        return number

    with pytest.raises(DataError, match="row 3 has no text"):
        list(in_processes(refusing, range(10), 2))


def test_processes_end_with_a_killed_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        workers = parent.stdout.readline().split()
        parent.send_signal(signal.SIGKILL)

    until = time.monotonic() + WAIT_S
    while any(_runs(int(worker)) for worker in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_runs(int(worker)) for worker in workers)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
