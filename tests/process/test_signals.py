"""A stop signal ends a run at once outside training, and at the next step inside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megakd import cli
from megakd.process import signals
from megakd.process.signals import Stopped, deferred, requested, watched

WAIT_S = 60
STUCK = """
import signal, sys, threading
from megakd.process import signals
signals.SAME_REQUEST_S = 0.0
with signals.watched(), signals.deferred():
    signal.raise_signal(signal.SIGTERM)
    print("noted", flush=True)
    threading.Lock().acquire() or threading.Event().wait()
    while True:
        threading.Event().wait()
"""
FORKED = """
import os, signal, time
from megakd.process import signals
with signals.watched(), signals.deferred():
    child = os.fork()
    if child == 0:
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM, status
    assert signals.requested() == 0
    print(threads := signals._active._first)
"""


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Background processes of a shell ignore SIGINT, those of nohup SIGHUP; children inherit it."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(WAIT_S)  # the signal ends it


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_command_that_does_not_train_ends_at_once_with_one_line_of_rank_0(
    capsys, monkeypatch, number
):
    codes, answers = [], []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        codes.append(cli._guarded(lambda: send(number)))
        answers.append(capsys.readouterr().err)

    assert codes == [128 + number] * 2
    name = signal.Signals(number).name
    line = f"megakd: stopped by {name}; start the same command again to continue\n"
    assert answers == [line, ""]


def test_neither_what_forgives_errors_nor_a_context_that_fails_as_it_is_left_hides_a_stop():
    forgiven: list[Exception] = []

    @contextmanager
    def gathered():
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the very thing that is tested
            forgiven.append(error)
        finally:
            raise RuntimeError("still active")

    with pytest.raises(Stopped), watched(), gathered():
        send(signal.SIGTERM)

    assert forgiven == []


def stage(seen: list[int], error: Exception | None = None) -> None:
    """A stage that gets SIGTERM, with its state before and after."""
    with deferred():
        seen.append(requested())
        signal.raise_signal(signal.SIGTERM)
        seen.append(requested())
        if error:
            raise error


def test_training_is_told_and_stops_at_the_latest_when_the_stage_ends():
    seen: list[int] = []

    with watched(), pytest.raises(Stopped) as stop:
        stage(seen)

    assert seen == [0, signal.SIGTERM]
    assert (stop.value.number, stop.value.saved) == (signal.SIGTERM, "")


def test_an_error_of_a_stage_is_not_hidden_by_a_signal():
    with watched(), pytest.raises(KeyError, match="real"):
        stage([], KeyError("real"))


def test_a_signal_after_the_agreed_stop_does_not_disturb_the_clean_up():
    with watched():
        with pytest.raises(Stopped) as raised, deferred():
            raise signals.stopped(signal.SIGTERM, "student saved at step 8")
        signal.raise_signal(signal.SIGTERM)

    assert str(raised.value) == (
        "stopped by SIGTERM, student saved at step 8; start the same command again to continue"
    )


@pytest.mark.parametrize("own_signal", [False, True])
def test_a_rank_that_another_rank_tells_of_the_end_of_their_launcher_says_so(
    monkeypatch, *, own_signal
):
    watch = signals._Watch()  # its thread, which looks at the launchers, has not started
    monkeypatch.setattr(signals, "_active", watch)
    monkeypatch.setattr(watch._launchers, "have_ended", lambda: True)
    if own_signal:
        watch.request(signal.SIGTERM)

    stop = signals.stopped(signal.SIGTERM, "student saved at step 8")

    assert stop.reason == ("SIGTERM" if own_signal else signals.LAUNCHER_ENDED)


def test_an_ignored_signal_stays_ignored_and_afterwards_all_are_as_before():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]

    with watched():
        signal.raise_signal(signal.SIGINT)
        assert requested() == 0
        assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] != before

    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def run(program: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True)


def test_a_second_signal_ends_a_process_that_waits_for_ever():
    process = run(STUCK)
    assert process.stdout is not None
    assert process.stdout.readline() == "noted\n"

    process.send_signal(signal.SIGTERM)

    _, output = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143
    assert output == f"megakd: process {process.pid} ended at once: a second signal\n"


def test_a_signal_to_a_forked_child_is_no_signal_to_its_parent():
    process = run(FORKED)

    out, output = process.communicate(timeout=WAIT_S)

    assert (process.returncode, out) == (0, "None\n"), output


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """The reasons for which a process would have ended at once."""
    reasons: list[str] = []
    monkeypatch.setattr(signals, "_end_at_once", lambda _, reason: reasons.append(reason))
    return reasons


@pytest.mark.parametrize(
    ("numbers", "seconds", "ends"),
    [
        pytest.param("INT TERM", 0.1, False, id="ctrl-c, from the terminal and the launcher"),
        pytest.param("TERM TERM", 0.1, False, id="a process group and its launcher"),
        pytest.param("USR1 TERM", 90.0, False, id="early warning, then the end of the job"),
        pytest.param("INT INT", 3.0, True, id="ctrl-c again"),
        pytest.param("USR1 TERM TERM", 5.0, True, id="the end of the job, twice"),
    ],
)
def test_what_counts_as_a_second_signal(monkeypatch, ended, numbers, seconds, *, ends):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    watch = signals._Watch()

    for name in numbers.split():
        watch._note(signal.Signals[f"SIG{name}"])
        now[0] += seconds

    assert bool(ended) is ends


def test_a_rank_that_hangs_when_its_launcher_is_gone_ends_after_a_while(monkeypatch, ended):
    sent: list[int] = []
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "kill", lambda _, number: sent.append(number))
    watch = signals._Watch()
    monkeypatch.setattr(watch._launchers, "have_ended", lambda: True)

    for now[0] in (0.0, 1.0, signals.GRACE_S):
        watch._look_at_launchers()
    assert sent == [signal.SIGTERM]
    assert ended == []
    now[0] = signals.GRACE_S + 1
    watch._look_at_launchers()

    assert len(ended) == 1
