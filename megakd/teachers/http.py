"""JSON over HTTP: time limits, retries, errors that name the server, and requests at once.

Proxies of the environment are not used: inference servers are inside the cluster.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from megakd.errors import ServerError

BUSY = (429, 502, 503, 504)
"""Status codes of a server, or of a gateway before the server, that may answer later."""
PATIENCE_S = 60.0
"""Seconds in which a server may be gone during a run, such as behind a switch that fails over."""
FIRST_PATIENCE_S = 0.5
"""Seconds in which a server must accept a connection before the run."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
_SHOWN = 400  # characters of an answer in a message
T = TypeVar("T")
Tree = TypeVar("Tree", bound=BaseModel)


class Reply(NamedTuple):
    """The answer to a request; `where` is its method and address, for messages."""

    status: int
    text: str
    where: str

    def check(self) -> None:
        if self.status != 200:
            raise ServerError(f"{self.where} answered {self.status}: {self.text[:_SHOWN]}")

    def read(self, kind: type[Tree]) -> Tree:
        """Return the JSON of an answer with status 200."""
        self.check()
        try:
            return kind.model_validate_json(self.text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ServerError(
                f"{self.where}: the answer cannot be read ({place}: {first['msg']}): "
                f"{self.text[:_SHOWN]}; check the address, and the version of the server"
            ) from error


class JsonServer:
    """A server that is asked by JSON over HTTP; calls from several threads are independent.

    Args:
        time_limit_s: seconds for the answer to one request, including all retries.
        key: of an API that asks for one.
        patience_s: seconds in which a server that gives no whole answer is asked again: the name is
            not resolved, or the connection is refused or lost, also in the middle of an answer.
    """

    def __init__(
        self,
        url: str,
        *,
        time_limit_s: float,
        patience_s: float = PATIENCE_S,
        key: str | None = None,
    ) -> None:
        self.url = url
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._limit, self._patience = time_limit_s, min(patience_s, time_limit_s)
        # A connection per request: servers close those that idle between two steps.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx2.Client(trust_env=False, limits=limits, headers=headers)

    def ask(self, path: str, tree: Any = None) -> Reply:
        """Return the answer to GET, or to POST with a JSON body, whatever its status.

        A busy server and lost connections are asked again with pauses that double. A request may
        therefore arrive twice, and must have the same effect twice.
        """
        method = "GET" if tree is None else "POST"
        where, pause = f"{method} {self.url}{path}", _FIRST_PAUSE_S
        began, lost = time.monotonic(), math.inf
        while True:
            left = max(self._limit - (time.monotonic() - began), 0.001)
            # A host that drops packets must not take the time of an answer.
            timeout = httpx2.Timeout(left, connect=min(left, self._patience + 5))
            try:
                answer = self._client.request(method, self.url + path, json=tree, timeout=timeout)
                if answer.status_code not in BUSY:
                    return Reply(answer.status_code, answer.text, where)
                reason = f"it is busy: {answer.status_code}: {answer.text[:_SHOWN]}"
                lost = math.inf
            except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
                raise ServerError(
                    f"{where} got no answer within {self._limit:g} s; see the log of the server"
                ) from error
            except httpx2.TransportError as error:
                # A connection may be lost after a long wait for an answer: the patience begins
                # there.
                reason, lost = f"{type(error).__name__}: {error}", min(lost, time.monotonic())
            now = time.monotonic()
            if now + pause >= min(began + self._limit, lost + self._patience):
                raise ServerError(
                    f"{where}: no answer in {now - began:.1f} s ({reason}); start the server, or "
                    "correct the address"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


class RunningCalls(Generic[T]):
    """Calls that run in threads of their own, which do not keep the process from ending.

    They start in order, `at_once` at a time, and contain no collectives. After the first error no
    further call is started.
    """

    def __init__(self, calls: Sequence[Callable[[], T]], *, at_once: int) -> None:
        self._waiting = deque(enumerate(calls))
        self._results: dict[int, T] = {}
        self._errors: dict[int, Exception] = {}
        # The threads of concurrent.futures would be joined at the exit of a run that has failed.
        self._threads = [
            threading.Thread(target=self._work, name=f"megakd-request-{number}", daemon=True)
            for number in range(min(at_once, len(calls)))
        ]
        for thread in self._threads:
            thread.start()

    def results(self) -> list[T]:
        """Wait for all calls, and return their results in the order of the calls."""
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[min(self._errors)]
        return [self._results[number] for number in sorted(self._results)]

    def _work(self) -> None:
        while not self._errors:
            try:
                number, call = self._waiting.popleft()
            except IndexError:  # no call is left
                return
            try:
                self._results[number] = call()
            except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
                self._errors[number] = error
