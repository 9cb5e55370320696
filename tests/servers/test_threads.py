"""Calls that run at the same time: order, number at once, and the first error."""

from __future__ import annotations

import threading

import pytest

from megakd.servers.http import RunningCalls


def test_results_have_the_order_of_the_calls_and_the_caller_is_not_held_up():
    gate = threading.Event()

    running = RunningCalls([lambda n=n: (gate.wait(60), n)[1] for n in range(7)], at_once=3)
    gate.set()

    assert running.results() == [*range(7)]


def test_no_more_calls_run_at_the_same_time_than_allowed():
    barrier, lock, state = threading.Barrier(3, timeout=60), threading.Lock(), [0, 0]

    def call() -> None:
        with lock:
            state[0] += 1
            state[1] = max(state)
        barrier.wait()  # passes only when three calls run
        with lock:
            state[0] -= 1

    RunningCalls([call] * 9, at_once=3).results()

    assert state == [0, 3]


def test_the_first_error_is_raised_and_later_calls_do_not_start():
    begun = []

    def call(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise OSError("broken")

    running = RunningCalls([lambda n=n: call(n) for n in range(50)], at_once=1)

    with pytest.raises(OSError, match="broken"):
        running.results()
    assert begun == [0, 1]


def test_no_calls_give_no_results():
    assert RunningCalls([], at_once=4).results() == []
