"""JSON over HTTP: limits that hold, retries that end, and messages that name the server."""

from __future__ import annotations

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
from megakd.servers.http import JsonServer

BODY = {"model": "tiny", "prompt": [4, 7], "max_tokens": 3, "seed": 0, "temperature": 0.0}
BODY |= {"stop_token_ids": [1]}


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub("vllm")
    with serving(stub):
        yield stub


HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n"
WHOLE = HEADERS + b'{"version": "0.33.0"}'


@contextmanager
def speaking(
    answers: list[bytes], *, byte_s: float = 0.0, family: int = socket.AF_INET
) -> Iterator[str]:
    """A server that gives each connection the next answer, the last one again; its address.

    The body comes byte by byte, with `byte_s` before each byte.
    """
    server = socket.create_server(
        ("127.0.0.1" if family == socket.AF_INET else "::1", 0), family=family
    )

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
    host = "127.0.0.1" if family == socket.AF_INET else "[::1]"
    yield f"http://{host}:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_server_that_is_not_there_is_named_at_once():
    url = f"http://127.0.0.1:{free_port()}"

    with pytest.raises(ServerError) as caught:
        JsonServer(url, time_limit_s=600, patience_s=0.3).get("/v1/models")

    assert f"GET {url}/v1/models: no server answers there" in str(caught.value)
    assert "refused" in str(caught.value)


def test_a_host_that_does_not_exist_is_named():
    with pytest.raises(ServerError, match=r"http://no-such-host\.invalid:8000/version"):
        JsonServer("http://no-such-host.invalid:8000", time_limit_s=5, patience_s=0).get("/version")


def test_a_server_that_comes_up_during_the_patience_is_waited_for():
    stub = Stub("vllm")
    answered: list[int] = []

    class Late(JsonServer):
        def _once(self, method, path, body, *, timeout_s):
            if not answered:
                answered.append(1)
                raise ConnectionRefusedError("refused")
            return super()._once(method, path, body, timeout_s=timeout_s)

    with serving(stub):
        assert Late(stub.url, time_limit_s=30).get("/version").tree() == {"version": "0.33.0"}


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again(stub: Stub, status: int):
    stub.busy, stub.busy_status = 3, status

    reply = JsonServer(stub.url, time_limit_s=60).post("/v1/completions", BODY)

    assert reply.status == 200
    assert len(stub.of("/v1/completions")) == 4


def test_an_answer_that_breaks_off_is_asked_for_again():
    with speaking([WHOLE[:-5], WHOLE]) as url:
        assert JsonServer(url, time_limit_s=30).get("/version").tree() == {"version": "0.33.0"}


def test_an_answer_that_always_breaks_off_is_named():
    with speaking([WHOLE[:-5]]) as url, pytest.raises(ServerError, match=r"IncompleteRead.*5 more"):
        JsonServer(url, time_limit_s=30, patience_s=0.2).get("/version")


def test_a_name_that_is_not_resolved_for_a_moment_is_asked_again(stub: Stub, monkeypatch):
    resolve, failures = socket.getaddrinfo, [socket.gaierror(-3, "Temporary failure")]

    def flaky(*arguments, **keys):
        if failures:
            raise failures.pop()
        return resolve(*arguments, **keys)

    monkeypatch.setattr(socket, "getaddrinfo", flaky)
    assert JsonServer(stub.url, time_limit_s=30).get("/version").status == 200


def test_the_time_limit_is_for_the_whole_answer():
    """Also if single bytes keep coming."""
    began = time.monotonic()
    with speaking([WHOLE], byte_s=0.1) as url, pytest.raises(ServerError, match=r"within 0\.5 s"):
        JsonServer(url, time_limit_s=0.5).get("/version")

    assert time.monotonic() - began < 2


def test_an_address_of_ipv6_is_asked():
    with speaking([WHOLE], family=socket.AF_INET6) as url:
        assert url.startswith("http://[::1]:")
        assert JsonServer(url, time_limit_s=30).get("/version").status == 200


def test_a_server_that_stays_busy_is_given_up_within_the_limit(stub: Stub):
    stub.busy = 10**6

    with pytest.raises(ServerError, match=r"was busy for .* the last answer was 503: .*loading"):
        JsonServer(stub.url, time_limit_s=0.5).post("/v1/completions", BODY)

    assert len(stub.of("/v1/completions")) < 20  # pauses become longer


def test_a_slow_answer_is_waited_for_up_to_the_limit(stub: Stub):
    stub.delay_s = 0.3

    assert JsonServer(stub.url, time_limit_s=60).post("/v1/completions", BODY).status == 200
    stub.delay_s = 30
    with pytest.raises(ServerError, match=r"no answer within 0\.2 s \(time_limit\)"):
        JsonServer(stub.url, time_limit_s=0.2).post("/v1/completions", BODY)


def test_a_refusal_of_the_server_is_shown_and_not_tried_again(stub: Stub):
    reply = JsonServer(stub.url, time_limit_s=60).post("/v1/completions", BODY | {"model": "big"})

    with pytest.raises(ServerError, match=r"/v1/completions answered 404: .*does not exist"):
        reply.tree()
    assert len(stub.of("/v1/completions")) == 1


def test_text_that_is_not_json_is_shown(stub: Stub):
    stub.spoil = lambda *_: "<html>proxy</html>"

    with pytest.raises(ServerError, match="not JSON: <html>proxy</html>"):
        JsonServer(stub.url, time_limit_s=60).get("/version").tree()


def test_a_long_answer_is_shortened_in_the_message(stub: Stub):
    stub.spoil = lambda *_: json.dumps({"error": "x" * 5000})

    with pytest.raises(ServerError) as caught:
        JsonServer(stub.url, time_limit_s=60).get("/nothing").tree()

    assert len(str(caught.value)) < 700
