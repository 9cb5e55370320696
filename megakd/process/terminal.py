"""What a command reads and answers, the time of its phases, and the signals that stop it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megakd.errors import ConfigError
from megakd.process.files import chain_of

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


@contextlib.contextmanager
def print_aside(*, when: bool = True) -> Iterator[None]:
    """Redirect standard output of the body to standard error: Python, C++ and child processes.

    Libraries print to standard output when they are imported or started, and a program that reads
    JSON from standard output cannot tell these prints from the answer.
    """
    if not when:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
            sys.stderr.flush()
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def tell(text: str) -> None:
    """Print a text; end quietly if the program that reads it has ended, as `head` does."""
    try:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again at its end, and would report the same error.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def in_home(text: str | Path) -> Path:
    """Return a path with ~ or ~name at its beginning replaced by the home folder of the user.

    Shells leave `--to=~/folder` unchanged. A name that is no user stays as written. Variables are
    replaced too, see `with_variables`.
    """
    path = with_variables(str(text))
    return Path(os.path.expanduser(path))  # noqa: PTH111, Path.expanduser raises RuntimeError


def with_variables(path: str) -> str:
    """Return a path with the values of `$NAME` and `${NAME}`; one that exists as written stays."""
    names = (name.strip("{}") for name in re.findall(r"\$([A-Za-z_]\w*|\{[^}]*\})", path))
    unset = [name for name in names if not os.environ.get(name)]
    if unset and not os.path.lexists(path):
        raise ConfigError(
            f"the variable {unset[0]} is not set (got {path!r}); set it, or write the path out"
        )
    return path if unset else os.path.expandvars(path)


def aligned_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with the first cells left-aligned and the other cells right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def is_first_of_node() -> bool:
    """Return whether this process is the first rank of its node, which prints errors."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def is_rank_0() -> bool:
    """Return whether this process is the rank that prints, before the process group exists."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


Seconds = dict[str, float]

_running: ContextVar[_Clock | None] = ContextVar("phases", default=None)


class _Clock:
    """A clock that adds the time since the last change of phase to the current phase."""

    def __init__(self, since_s: float) -> None:
        self.seconds: Seconds = {}
        self._phase = "start"
        self._since = time.perf_counter() - since_s

    def change(self, phase: str) -> str:
        now = time.perf_counter()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        # The phase `start` does not resume once another phase has begun.
        before = "other" if self._phase == "start" else self._phase
        self._phase, self._since = phase, now
        return before


@contextmanager
def counted(*, since_s: float = 0.0) -> Iterator[None]:
    """Count the seconds of a run from its phase `start`; a nested call does nothing."""
    if _running.get() is not None:
        yield
        return
    token = _running.set(_Clock(since_s))
    try:
        yield
    finally:
        _running.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the body under a name; the time of a nested phase is not counted for the outer one."""
    clock = _running.get()
    if clock is None:
        yield
        return
    before = clock.change(name)
    try:
        yield
    finally:
        clock.change(before)


def seconds() -> Seconds:
    """Return the seconds of every phase so far, or {} if no run is counted."""
    clock = _running.get()
    if clock is None:
        return {}
    clock.change(clock.change("other"))
    return {name: value for name, value in clock.seconds.items() if value > 0}


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
