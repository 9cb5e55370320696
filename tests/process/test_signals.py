"""A stop signal ends a run at once outside training, and at the next step inside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from megakd import cli
from megakd.process import signals
from megakd.process.signals import Stopped, deferred, requested, watched

WAIT_S = 60
FORKED = """
import os, signal, time
from megakd.process import signals as signals
with signals.watched(), signals.deferred():
    child = os.fork()
    if child == 0:
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM, status
    assert signals.requested() == 0
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


class SignalledWhileDestroyed:
    """An object that is destroyed at the moment of a signal, as one of a library's import was."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_stop_that_python_drops_in_a_destructor_is_raised_again():
    def build() -> None:
        SignalledWhileDestroyed()
        time.sleep(WAIT_S)

    with pytest.raises(Stopped), watched():
        build()


def stage(seen: list[int], error: Exception | None = None) -> None:
    """A stage that gets SIGTERM, with its state before and after."""
    with deferred():
        seen.append(requested())
        signal.raise_signal(signal.SIGTERM)
        seen.append(requested())
        if error:
            raise error


@pytest.mark.parametrize("rank", ["0", "1"])
def test_training_is_told_says_so_at_once_and_stops_when_the_stage_ends(capfd, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    seen: list[int] = []

    with watched(), pytest.raises(Stopped) as stop:
        stage(seen)

    assert seen == [0, signal.SIGTERM]
    assert (stop.value.number, stop.value.saved) == (signal.SIGTERM, "")
    told = "stopping after this step and its checkpoint; a second signal ends the run at once"
    assert (told in capfd.readouterr().err) is (rank == "0")


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


def test_an_ignored_signal_stays_ignored_and_afterwards_all_are_as_before():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]

    with watched():
        signal.raise_signal(signal.SIGINT)
        assert requested() == 0
        assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] != before

    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before


@pytest.mark.parametrize(
    ("names", "seconds", "ends"),
    [
        ("INT TERM", 0.1, False),  # Ctrl+C, from the terminal and the launcher
        ("TERM TERM", 0.1, False),  # a process group and its launcher
        ("USR1 TERM", 90.0, False),  # early warning, then the end of the job
        ("INT INT", 3.0, True),
        ("USR1 TERM TERM", 5.0, True),
    ],
)
def test_a_second_signal_ends_a_process_at_once(capfd, monkeypatch, names, seconds, *, ends):
    now, codes = [1.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "_exit", codes.append)
    numbers = [signal.Signals[f"SIG{name}"] for name in names.split()]

    with suppress(Stopped), watched(), deferred():
        for number in numbers:
            signal.raise_signal(number)
            now[0] += seconds

    assert codes == ([128 + numbers[-1]] if ends else [])
    assert ("ended at once: a second signal\n" in capfd.readouterr().err) is ends


def test_a_signal_to_a_forked_child_is_no_signal_to_its_parent():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=WAIT_S)
