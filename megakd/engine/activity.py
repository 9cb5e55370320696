"""The activity of every rank, for a log that is silent, and for a rank that waits too long.

The activities change a few times per evaluation or save, never per step. They are kept in the
store of the process group, where a rank can read them without the others. Also here: heartbeats
for the rank monitor of a launcher.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_PREFIX = "megakd/activity"
MONITOR = "FT_RANK_MONITOR_IPC_SOCKET"
_clients: list[Any] = []
_current: list[str] = ["starting"]
_limit: list[float] = []
_reached: list[str] = [""]
_shown: list[float] = [0.0]
logger = logging.getLogger(__name__)
SILENCE_S = 9.0
ANSWER_S = 3.0
"""Seconds within which the store of the process group must answer."""


def begin(limit_s: float) -> None:
    """Forget the activities of an earlier run, and record the limit of its collectives."""
    _current[:] = ["starting"]
    _limit[:] = [limit_s]


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name the activity of this rank in the body, such as `scoring stage student`."""
    _current.append(what)
    _reached[0] = ""
    _publish()
    try:
        yield
    except RuntimeError:
        raise  # of a collective: the message names the activity
    except BaseException:
        _current.pop()
        raise
    _current.pop()
    _current[0] = "between two stages"
    _reached[0] = ""
    _publish()


def reached(what: str, *, shown: bool = False) -> None:
    """Name how far the activity is; `shown` says that a progress bar shows it."""
    beat()
    _reached[0] = f", {what}"
    if shown:
        _shown[0] = time.monotonic()


@contextmanager
def monitored() -> Iterator[None]:
    """Let `beat` reach the rank monitor of NVIDIA's `ft_launcher` in the body, if there is one.

    The monitor, which restarts a run that hangs, tells a rank its socket by a variable, and needs
    the package nvidia-resiliency-ext.
    """
    if not os.environ.get(MONITOR):
        yield
        return
    client = importlib.import_module("nvidia_resiliency_ext.fault_tolerance").RankMonitorClient()
    client.init_workload_monitoring()
    _clients.append(client)
    try:
        yield
    finally:
        _clients.remove(client)
        client.shutdown_workload_monitoring()


def beat() -> None:
    """Tell the monitor that this rank makes progress; call it between two steps or batches."""
    for client in _clients:
        client.send_heartbeat()


class _Shown(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        del record
        _shown[0] = time.monotonic()


@contextmanager
def told() -> Iterator[None]:
    """Log the activity inside the context whenever the log was silent for `SILENCE_S`."""
    log, handler, ended = logging.getLogger("megakd"), _Shown(), threading.Event()

    def watch() -> None:
        while not ended.wait(max(0.1, _shown[0] + SILENCE_S - time.monotonic())):
            if time.monotonic() - _shown[0] >= SILENCE_S:
                logger.info("… %s%s", _current[-1], _reached[0])

    _shown[0] = time.monotonic()
    log.addHandler(handler)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        log.removeHandler(handler)


def _publish() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        record = json.dumps([_current[-1], time.time()])
        # torchrun holds the store. If torchrun was killed, the ranks still have to save.
        with suppress(RuntimeError):
            _store().set(f"{_PREFIX}/{dist.get_rank()}", record)


def too_long() -> str:
    """Return the message of a rank whose collective has reached the limit."""
    rank = os.environ.get("RANK", "0")
    waited = f"{_limit[0]:g} s" if _limit else "too long"
    return (
        f"rank {rank} has waited {waited} for the other ranks (train.collective_timeout) while "
        f"{_current[-1]}; {_others()}. If that work may take so long, raise "
        "train.collective_timeout; otherwise see the output of the other ranks"
    )


def _others() -> str:
    answers: dict[int, Any] = {}
    ranks = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]

    def ask() -> None:
        for rank in ranks:
            key = f"{_PREFIX}/{rank}"
            with suppress(RuntimeError):  # the store ends with rank 0
                if _store().check([key]):
                    answers[rank] = json.loads(_store().get(key))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    # A store answers never if its process, that of rank 0 or the launcher, is stopped.
    asking.join(ANSWER_S)
    if asking.is_alive():
        return "rank 0 or its launcher does not answer"
    told = [
        f"rank {rank} was {record[0]}, begun {max(0.0, time.time() - record[1]):.0f} s ago"
        for rank, record in answers.items()
        if record[0] != _current[-1]
    ]
    # With many ranks, the ranks that do something else are the interesting ones.
    return ", ".join(told[:8]) or "all other ranks were doing the same"


def _store() -> Any:
    return distributed_c10d._get_default_store()  # noqa: SLF001 - the only store all ranks share


class Stopwatch:
    """Sum of the time inside `running()`; on GPUs measured by events, read only in `seconds`."""

    def __init__(self) -> None:
        self._seconds, self.is_running = 0.0, False
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        self.is_running = True
        try:
            with self._timed():
                yield
        finally:
            self.is_running = False

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if not torch.cuda.is_available():
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        yield
        ended.record()
        self._pending.append((began, ended))

    def seconds(self) -> float:
        """Return the time so far; on a GPU this waits for the last event, so call it rarely."""
        for began, ended in self._pending:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        self._pending.clear()
        return self._seconds
