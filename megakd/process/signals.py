"""The signals that stop a run."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from megakd.process.files import chain_of
from megakd.process.terminal import is_rank_0

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

# Ctrl+C reaches a rank twice: from the terminal and, as SIGTERM, from its launcher.
SAME_REQUEST_S = 2.0

_AGAIN_S = 0.05

_STOPPING = (
    "\nmegakd: stopping after this step and its checkpoint; a second signal ends the run at once, "
    "and the steps since the last checkpoint are lost\n"
)


class Stopped(BaseException):
    """The run was stopped by a signal; `saved` tells what is saved.

    Not an `Exception`: code that ignores the errors of a chart or a stopwatch must not ignore a
    stop.
    """

    def __init__(self, number: int, saved: str = "") -> None:
        super().__init__(number, saved)
        self.number, self.saved = number, saved

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it."""
        return 128 + self.number

    def __str__(self) -> str:
        done = f", {self.saved}" if self.saved else ""
        name = signal.Signals(self.number).name
        return f"stopped by {name}{done}; start the same command again to continue"


class _Watch:
    """Handler of the stop signals of this process, and the first signal: 0 before it."""

    def __init__(self) -> None:
        self.requested, self.deferred, self._urgent_since = 0, False, 0.0
        # A signal that is ignored, such as SIGHUP under nohup, stays ignored.
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._before = {k: v for k, v in before.items() if v is not signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._handle)
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._raise)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._raise_later

    def release(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self.deferred:
            raise Stopped(self.requested)

    def _raise_later(self, ignored: UnraisableHookArgs) -> None:
        # Python drops what a destructor raises, also if a signal came while it ran.
        if isinstance(ignored.exc_value, Stopped):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            self._hook(ignored)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):  # SIGUSR1 may be the early warning of a job
            now = time.monotonic()
            self._urgent_since = self._urgent_since or now
            if now - self._urgent_since > SAME_REQUEST_S:
                text = f"megakd: process {os.getpid()} ended at once: a second signal\n"
                os.write(2, text.encode())
                os._exit(128 + number)
        if not self.requested:
            self.requested = number
            if not self.deferred:
                raise Stopped(number)
            if is_rank_0():
                os.write(2, _STOPPING.encode())


_active: _Watch | None = None


def _release() -> None:
    global _active  # noqa: PLW0603 - signal handlers belong to the process, and so does this
    if _active is not None:
        _active.release()
    _active = None


os.register_at_fork(after_in_child=_release)


@contextmanager
def watched() -> Iterator[None]:
    """Raise `Stopped` in the body at a stop signal.

    Does nothing outside the main thread, where Python allows no handlers, or if it is nested.
    """
    global _active  # noqa: PLW0603
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _active = _Watch()
    try:
        yield
    except Exception as error:
        # A context that a stop leaves may fail: DeepSpeed's gathered weights do inside a forward.
        for behind in chain_of(error):
            if isinstance(behind, Stopped):
                raise behind from None
        raise
    finally:
        _release()


@contextmanager
def deferred() -> Iterator[None]:
    """Record stop signals in the body instead of raising; the body calls `requested`.

    A signal without an answer is raised after the body, on each rank that has received it.
    """
    watch = _active
    if watch is None:
        yield
        return
    watch.deferred = True
    try:
        yield
    finally:
        watch.deferred = False
    if watch.requested:
        raise Stopped(watch.requested)


def requested() -> int:
    """Return the stop signal that this process has received, or 0."""
    return _active.requested if _active is not None else 0


def stopped(number: int, saved: str) -> Stopped:
    """Return the error of a stop that all ranks have agreed on; ignore the other ranks' signals."""
    if _active is not None:
        _active.requested = number
    return Stopped(number, saved)
