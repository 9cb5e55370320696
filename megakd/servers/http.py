"""JSON over HTTP with the standard library: time limits, retries, and errors that name the server.

Proxies of the environment are not used: inference servers are inside the cluster.
"""

from __future__ import annotations

import functools
import http.client
import json
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic_core import from_json

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


class Reply(NamedTuple):
    """The answer to a request; `where` is its method and address, for messages."""

    status: int
    text: str
    where: str

    def tree(self) -> Any:
        """Return the JSON of an answer with status 200."""
        self.check()
        try:
            # Twice as fast as json.loads for numbers by token; the names of tokens hardly repeat.
            return from_json(self.text, cache_strings="none")
        except ValueError as error:
            raise ServerError(
                f"{self.where} answered with text that is not JSON: {_shown(self.text)}; check "
                "that the address is that of the server itself"
            ) from error

    def check(self) -> None:
        if self.status != 200:
            raise ServerError(f"{self.where} answered {self.status}: {_shown(self.text)}")


class JsonServer:
    """A server that is asked by JSON over HTTP; calls from several threads are independent.

    Args:
        time_limit_s: seconds for the answer to one request, including all retries.
        patience_s: seconds in which a server that gives no whole answer is asked again: the name is
            not resolved, or the connection is refused or lost, also in the middle of an answer.
    """

    def __init__(self, url: str, *, time_limit_s: float, patience_s: float = PATIENCE_S) -> None:
        self.url = url
        self._limit, self._patience = time_limit_s, min(patience_s, time_limit_s)

    def get(self, path: str) -> Reply:
        return self._ask("GET", path, None)

    def post(self, path: str, tree: object) -> Reply:
        """Return the answer to POST with a JSON body, whatever its status, after retries.

        A busy server and lost connections are asked again with pauses that double. A request may
        therefore arrive twice, and must have the same effect twice.
        """
        return self._ask("POST", path, json.dumps(tree, allow_nan=False))

    def _ask(self, method: str, path: str, body: str | None) -> Reply:
        began, lost, pause = time.monotonic(), math.inf, _FIRST_PAUSE_S
        while True:
            left = self._limit - (time.monotonic() - began)
            reply = self._attempt(method, path, body, timeout_s=left)
            if isinstance(reply, Reply) and reply.status not in BUSY:
                return reply
            now = time.monotonic()
            # A connection may be lost after a long wait for an answer: the patience begins there.
            lost = math.inf if isinstance(reply, Reply) else min(lost, now)
            if now + pause >= min(began + self._limit, lost + self._patience):
                if isinstance(reply, Reply):
                    raise ServerError(
                        f"{reply.where} was busy for {now - began:.1f} s: the last answer was "
                        f"{reply.status}: {_shown(reply.text)}; see the log of the server, or "
                        "raise time_limit"
                    )
                raise ServerError(
                    f"{method} {self.url}{path}: no server answers there in {now - lost:.1f} s "
                    f"({reply}); start the server, or correct the address"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _attempt(
        self, method: str, path: str, body: str | None, *, timeout_s: float
    ) -> Reply | Exception:
        parts, deadline = urlsplit(self.url), time.monotonic() + timeout_s
        is_secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        try:
            with closing(
                kind(parts.hostname or "", parts.port, timeout=max(timeout_s, 0.001))
            ) as connection:
                connection.request(method, parts.path + path, body=body, headers=headers)
                sock, answer = connection.sock, connection.getresponse()
                text = b"".join(_parts(answer, sock, deadline)).decode("utf-8", errors="replace")
                return Reply(answer.status, text, f"{method} {self.url}{path}")
        except TimeoutError as error:
            if error.errno is not None:  # the kernel's, of a connection that is lost
                return error
            raise ServerError(
                f"{method} {self.url}{path} got no answer within {self._limit:g} s (time_limit); "
                "see the log of the server, or raise the limit"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            return error


def _parts(
    answer: http.client.HTTPResponse, sock: socket.socket, deadline: float
) -> Iterator[bytes]:
    # A timeout of a socket is for one read alone.
    while not answer.isclosed():
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        if not (part := answer.read1(1 << 20)):
            break
        yield part
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


def field_of(tree: Any, key: str, kind: type[T], where: str) -> T:
    """Return a field of a JSON object."""
    value = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(value, kind):
        content = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise ServerError(
            f"{where}: the answer has no {kind.__name__} named {key} (found: {content}); check "
            "that the address is that of a vLLM server, and its version"
        )
    return value


def numbers_of(tree: Any, key: str, where: str) -> tuple[int, ...]:
    """Return a field that holds token numbers."""
    values = field_of(tree, key, list, where)
    wrong = [value for value in values if type(value) is not int or value < 0]
    if wrong:
        raise ServerError(f"{where}: {key} holds {wrong[0]!r}, which is no token number")
    return tuple(values)


def reads_answers(method: Callable[..., T]) -> Callable[..., T]:
    """Let a method of a server raise ServerError for JSON values of another form than it reads.

    A broken server would otherwise end the run in a traceback.
    """

    @functools.wraps(method)
    def reading(server: Any, *arguments: Any) -> T:
        try:
            return method(server, *arguments)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ServerError(
                f"{server.url}: the answer cannot be read ({type(error).__name__}: {error}); "
                "check that the address is that of a vLLM server, and its version"
            ) from error

    return reading


class RunningCalls(Generic[T]):
    """Calls that run in threads of their own, which do not keep the process from ending.

    They start in order, `at_once` at a time, and contain no collectives. After the first error no
    further call is started.
    """

    def __init__(self, calls: Sequence[Callable[[], T]], *, at_once: int) -> None:
        self._waiting = deque(enumerate(calls))
        self._results: dict[int, T] = {}
        self._errors: dict[int, Exception] = {}
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
