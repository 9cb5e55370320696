"""JSON over HTTP: limits that hold, retries that end, calls at once, and what is named."""

from __future__ import annotations

import errno
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from server_stubs import Stub, serving

from megakd.errors import ServerError
from megakd.teachers.servers import JsonServer, running_calls

TEXTS = "/v1/completions"
BODY = {"model": "tiny", "prompt": [4, 7], "max_tokens": 3, "seed": 0, "temperature": 0.0}
BODY |= {"stop_token_ids": [1]}


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    with serving(stub):
        yield stub


HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n"
WHOLE = HEADERS + b'{"version": "0.33.0"}'


@contextmanager
def speaking(answers: list[bytes], *, byte_s: float = 0.0) -> Iterator[str]:
    """A server that gives each connection the next answer, the last one again; its address.

    The body comes byte by byte, with `byte_s` before each byte.
    """
    server = socket.create_server(("::1", 0), family=socket.AF_INET6)

    def serve() -> None:
        for number in itertools.count():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            answer = answers[min(number, len(answers) - 1)]
            with connection, suppress(OSError):
                connection.recv(65536)
                connection.sendall(answer[: len(HEADERS)])
                for byte in answer[len(HEADERS) :]:
                    time.sleep(byte_s)
                    connection.sendall(bytes([byte]))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://[::1]:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1", r"GET http://127\.0\.0\.1:1/version: no answer in .*refused"),
        ("http://no-such-host.invalid:8000", r"http://no-such-host\.invalid:8000/version"),
    ],
)
def test_a_server_that_is_not_there_is_named_at_once(url, message):
    with pytest.raises(ServerError, match=message):
        JsonServer(url, time_limit_s=600, patience_s=0.3).ask("/version")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError("refused"),
        socket.gaierror(-3, "Temporary failure"),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
    ],
    ids=["server", "name", "given up by the kernel"],
)
def test_a_server_or_a_name_that_comes_up_during_the_patience_is_waited_for(
    stub: Stub, monkeypatch, error
):
    resolve, failures = socket.getaddrinfo, [error]

    def flaky(*arguments, **keys):
        if failures:
            raise failures.pop()
        return resolve(*arguments, **keys)

    monkeypatch.setattr(socket, "getaddrinfo", flaky)
    version = JsonServer(stub.url, time_limit_s=30).ask("/version").read("version", str)
    assert version == "0.33.0"


def test_a_busy_server_is_asked_again_and_given_up_within_the_limit(stub: Stub):
    for status in (429, 502, 503, 504):
        stub.busy, stub.busy_status = 1, status
        assert JsonServer(stub.url, time_limit_s=60).ask(TEXTS, BODY).status == 200
    assert len(stub.of(TEXTS)) == 8

    stub.busy, stub.busy_status = 10**6, 503
    with pytest.raises(ServerError, match=r"it is busy: 503: .*loading"):
        JsonServer(stub.url, time_limit_s=0.5).ask(TEXTS, BODY)
    assert len(stub.of(TEXTS)) < 28  # pauses become longer


def test_an_answer_that_breaks_off_is_named_in_the_end():
    with (
        speaking([WHOLE[:-5]]) as url,
        pytest.raises(ServerError, match="without sending complete message body"),
    ):
        JsonServer(url, time_limit_s=30, patience_s=0.2).ask("/version")


def test_an_answer_that_breaks_off_is_asked_for_again_with_patience_from_then_on():
    """The first answer takes longer than the patience, and breaks off."""
    with speaking([WHOLE[:-5], WHOLE], byte_s=0.02) as url:
        server = JsonServer(url, time_limit_s=30, patience_s=0.2)
        assert server.ask("/version").read("version", str) == "0.33.0"


def test_a_slow_answer_is_waited_for_up_to_the_limit(stub: Stub):
    stub.delay_s = 0.3

    assert JsonServer(stub.url, time_limit_s=60).ask(TEXTS, BODY).status == 200
    stub.delay_s = 2
    with pytest.raises(ServerError, match=r"no answer within 0\.2 s"):
        JsonServer(stub.url, time_limit_s=0.2).ask(TEXTS, BODY)


def test_a_refusal_of_the_server_is_shown_and_not_tried_again(stub: Stub):
    reply = JsonServer(stub.url, time_limit_s=60).ask(TEXTS, BODY | {"model": "big"})

    with pytest.raises(ServerError, match=r"/v1/completions answered 404: .*does not exist"):
        reply.check()
    assert len(stub.of(TEXTS)) == 1


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/version", "<html>proxy</html>", "Invalid JSON.*: <html>proxy</html>"),
        ("/version", json.dumps({"version": 7}), r"version: Input should be a valid string"),
        ("/nothing", json.dumps({"error": "x" * 5000}), "x{100}"),
    ],
    ids=["not JSON", "another form", "long"],
)
def test_an_answer_that_is_not_understood_is_shown_in_part(stub: Stub, path, answer, message):
    stub.spoil = lambda *_: answer

    with pytest.raises(ServerError, match=message) as caught:
        JsonServer(stub.url, time_limit_s=60).ask(path).read("version", str)

    assert len(str(caught.value)) < 700


def test_results_have_the_order_of_the_calls_of_which_some_run_at_once():
    barrier = threading.Barrier(3, timeout=60)  # passes only when three calls run
    calls = [lambda n=n: (barrier.wait(), n)[1] for n in range(9)]

    assert running_calls(calls, at_once=3)() == [*range(9)]
    assert running_calls([], at_once=4)() == []


def test_the_first_error_is_raised_and_later_calls_do_not_start():
    begun = []

    def call(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise OSError("broken")

    finish = running_calls([lambda n=n: call(n) for n in range(50)], at_once=1)

    with pytest.raises(OSError, match="broken"):
        finish()
    assert begun == [0, 1]
