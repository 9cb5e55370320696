"""SIGINT, SIGTERM, SIGHUP and SIGUSR1: training saves a checkpoint first, other phases end at once.

A thread also reads the signals, because the main thread may wait in a collective for a rank that
never answers; a second signal then still ends the process. The same thread watches the launchers,
whose end is handled like a SIGTERM.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from types import FrameType
from typing import Any

import psutil

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Ctrl+C reaches a rank twice: from the terminal and, as SIGTERM, from its launcher.
SAME_REQUEST_S = 2.0
LOOK_EVERY_S = 1.0
# Launchers give their ranks 30 s; without a launcher, no process would end a rank that hangs.
GRACE_S = 120.0
LAUNCHER_ENDED = "the end of its launcher"
_active: _Watch | None = None
PROGRAMS = (
    "accelerate",
    "deepspeed",
    "torchrun",
    "ft_launcher",
    "mpirun",
    "mpiexec",
    "orted",
    "prted",
    "hydra_pmi_proxy",
)
MODULES = ("deepspeed.launcher.", "torch.distributed.run", "torch.distributed.launch")
FILES = (
    "deepspeed/launcher/launch.py",
    "torch/distributed/run.py",
    "torch/distributed/launch.py",
    "launch/pod.py",
)


class Stopped(BaseException):
    """The run was stopped by a signal or by the end of its launcher; `saved` tells what is saved.

    Not an `Exception`: code that ignores the errors of a chart or a stopwatch must not ignore a
    stop.
    """

    def __init__(self, number: int, reason: str, saved: str = "") -> None:
        super().__init__(number, reason, saved)
        self.number, self.reason, self.saved = number, reason, saved

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it."""
        return 128 + self.number

    def __str__(self) -> str:
        done = f", {self.saved}" if self.saved else ""
        return f"stopped by {self.reason}{done}; start the same command again to continue"


class _Watch:
    """Handler of the stop signals of this process, active from `start` to `stop`."""

    def __init__(self) -> None:
        self.requested = 0
        self.reason = ""
        self.deferred = False
        self._first: float | None = None
        self._launchers = Launchers()
        self._orphaned_at: float | None = None
        self._bytes: socket.socket
        self._wakeup: socket.socket
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._before: dict[signal.Signals, Any] = {}

    def start(self) -> None:
        # A signal that is ignored, such as under nohup, stays ignored.
        self._before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        self._bytes, self._wakeup = socket.socketpair()
        for end in (self._bytes, self._wakeup):
            end.setblocking(False)  # noqa: FBT003 - the socket's own interface
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._ended.set()
        self._wakeup.send(b"\0")
        self._thread.join()
        for end in (self._bytes, self._wakeup):
            end.close()

    def release(self) -> None:
        # In a forked child, so that the parent is not notified.
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.request(number) and not self.deferred:
            raise Stopped(number, self.reason)

    def request(self, number: int) -> bool:
        if self.requested:
            return False
        self.requested = number
        self.reason = self.reason or signal.Signals(number).name
        return True

    def agree(self, number: int) -> None:
        # This rank may not have noticed the cause.
        if not self.requested and self._launchers.have_ended():
            self.reason = LAUNCHER_ENDED
        self.request(number)

    def _run(self) -> None:
        while not self._ended.is_set():
            readable, _, _ = select.select([self._bytes], [], [], LOOK_EVERY_S)
            if readable:
                for number in self._bytes.recv(64):
                    self._note(number)
            self._look_at_launchers()

    def _note(self, number: int) -> None:
        # SIGUSR1 is only an early warning, and SIGHUP may come with the signal of a launcher.
        if number not in (signal.SIGINT, signal.SIGTERM):
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first > SAME_REQUEST_S:
            _end_at_once(number, "a second signal")

    def _look_at_launchers(self) -> None:
        if self._orphaned_at is None:
            if self._launchers.have_ended():
                self._orphaned_at = time.monotonic()
                if not self.requested:
                    self.reason, self._first = LAUNCHER_ENDED, self._orphaned_at
                    os.kill(os.getpid(), signal.SIGTERM)
        elif time.monotonic() - self._orphaned_at > GRACE_S:
            _end_at_once(
                signal.SIGTERM, f"still running {GRACE_S:.0f} s after the end of its launcher"
            )


def _end_at_once(number: int, reason: str) -> None:
    os.write(2, f"megakd: process {os.getpid()} ended at once: {reason}\n".encode())
    os._exit(128 + number)


def _release_in_child() -> None:
    global _active  # noqa: PLW0603 - signal handlers belong to the process, and so does this
    if _active is not None:
        _active.release()
        _active = None


os.register_at_fork(after_in_child=_release_in_child)


@contextmanager
def watched() -> Iterator[None]:
    """Raise `Stopped` in the body at a stop signal, or when the launcher of this rank ends.

    Does nothing outside the main thread, where Python allows no handlers, or if it is nested.
    """
    global _active  # noqa: PLW0603
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _active = watch = _Watch()
    watch.start()
    try:
        yield
    except Exception as error:
        # A context that a stop leaves may fail: DeepSpeed's gathered weights do inside a forward.
        stop = _stop_behind(error)
        if stop is None:
            raise
        raise stop from None
    finally:
        watch.stop()
        _active = None


def _stop_behind(error: BaseException) -> Stopped | None:
    behind = error.__context__
    if behind is None or isinstance(behind, Stopped):
        return behind
    return _stop_behind(behind)


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
        raise Stopped(watch.requested, watch.reason)


def requested() -> int:
    """Return the stop signal that this process has received, or 0."""
    return _active.requested if _active is not None else 0


def stopped(number: int, saved: str) -> Stopped:
    """Return the error of a stop that all ranks have agreed on; later signals are ignored."""
    watch = _active
    if watch is None:
        return Stopped(number, signal.Signals(number).name, saved)
    watch.agree(number)
    return Stopped(number, watch.reason, saved)


class Launchers:
    """The chain of processes from a rank up to its outermost launcher on this host.

    The chain of `deepspeed` has two processes: the runner and the launcher of the node. A process
    that was not started by a launcher has an empty chain and is never ended this way, not even
    when its shell ends.
    """

    def __init__(self) -> None:
        is_rank = "RANK" in os.environ or "SLURM_PROCID" in os.environ
        parents = psutil.Process().parents() if is_rank else []
        # The nearest launcher, its own launcher and so on, with all processes below them.
        launchers = [is_launcher(process) for process in parents]
        end = launchers.index(True) if True in launchers else 0
        while end < len(parents) and launchers[end]:
            end += 1
        self.chain = parents[:end]
        # A launcher that was killed while this rank started is no longer a parent. In a container,
        # process 1 may be a launcher of its own, a program in Python.
        is_orphan = is_launched() and not self.chain and os.getppid() == 1
        self._was_gone = is_orphan and not _first_is_python()

    def have_ended(self) -> bool:
        return self._was_gone or not all(map(_is_alive, self.chain))


def is_launched() -> bool:
    """Return whether DeepSpeed's launcher or torchrun has started this process."""
    # Only DeepSpeed's launcher sets the first variable, and only torchrun sets the second.
    return "CROSS_RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def is_launcher(process: psutil.Process) -> bool:
    """Return true if a process is a program that starts ranks."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    if not words:
        return False
    program = PurePath(words[0]).name
    if program.startswith("slurmstepd"):
        return True
    shown = words[:1] if not program.startswith("python") else words[1:6]
    return any(
        PurePath(word).name in PROGRAMS or word.startswith(MODULES) or word.endswith(FILES)
        for word in shown
    )


def _first_is_python() -> bool:
    try:
        return psutil.Process(1).name().startswith("python")
    except psutil.Error:  # hidden from this user
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
