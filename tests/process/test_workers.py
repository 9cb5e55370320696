"""Work in several processes, and the phases of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megakd.errors import DataError, MegakdError
from megakd.process import clock as phases
from megakd.process.clock import counted, phase, seconds
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
    squares = in_processes(lambda n: n * n, range(10), processes)
    assert list(squares) == [n * n for n in range(10)]


def test_a_process_that_ends_early_is_an_error_and_that_of_a_row_is_its_own():
    def refusing(number: int) -> int:
        if number == 3:
            raise DataError("row 3 has no text")
        return number

    with pytest.raises(DataError, match="row 3 has no text"):
        list(in_processes(refusing, range(10), 2))
    ending = in_processes(lambda n: os._exit(3) if n == 3 else n, range(10), 2)
    with pytest.raises(MegakdError, match="one of 2 processes that encode rows ended early"):
        list(ending)


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


# Every second is in one phase.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: now.value))
    return now


def test_a_phase_inside_another_takes_its_time_out_of_that_one(clock):
    with counted(since_s=9.0):
        clock.value += 1
        with phase("training"):
            clock.value += 2
            with phase("models"):
                clock.value += 4
            clock.value += 8
        clock.value += 16
        result = seconds()

    assert result == {"start": 10.0, "training": 10.0, "models": 4.0, "other": 16.0}


def test_a_function_can_be_a_phase_that_ends_as_it_fails_and_counts_nothing_outside_a_run(clock):
    @phase("data")
    def load(error: Exception | None = None) -> None:
        clock.value += 1
        if error:
            raise error

    load()
    assert seconds() == {}
    with counted():
        load()
        with pytest.raises(ValueError, match="no"):
            load(ValueError("no"))
        clock.value += 2

        assert seconds() == {"data": 2.0, "other": 2.0}
