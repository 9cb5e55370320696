"""Requests that run at the same time while the caller does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Running(Generic[T]):
    """Calls that run in threads of their own, which do not keep the process from ending.

    After the first error no further call is started.

    Args:
        calls: functions without collectives; they start in this order.
        at_once: number of calls that run at the same time.
    """

    def __init__(self, calls: Sequence[Callable[[], T]], *, at_once: int) -> None:
        self._calls = list(calls)
        self._results: dict[int, T] = {}
        self._errors: dict[int, Exception] = {}
        self._lock = threading.Lock()
        self._next = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"megakd-request-{number}", daemon=True)
            for number in range(min(at_once, len(self._calls)))
        ]
        for thread in self._threads:
            thread.start()

    def results(self) -> list[T]:
        """Wait for all calls, and return their results in the order of the calls.

        Raises:
            Exception: the error of the first call that failed.
        """
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[min(self._errors)]
        return [self._results[number] for number in range(len(self._calls))]

    def _work(self) -> None:
        while (number := self._taken()) is not None:
            try:
                self._results[number] = self._calls[number]()
            except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
                self._errors[number] = error

    def _taken(self) -> int | None:
        with self._lock:
            if self._errors or self._next == len(self._calls):
                return None
            self._next += 1
            return self._next - 1
