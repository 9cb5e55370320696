"""The seconds of the phases of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
