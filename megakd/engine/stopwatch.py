"""Device time of a part of a step, measured without a device sync in the step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sum of the time inside `running()`; on GPUs measured by events, read only in `seconds`."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the time of the body."""
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
