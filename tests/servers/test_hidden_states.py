"""Hidden states from vLLM servers: what is read and deleted, and files that are not believed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting_stubs import WIDTH, Exporting, Widths
from server_stubs import serving

from megakd.errors import ServerError
from megakd.servers import hidden_states
from megakd.servers.hidden_states import StatesServer, read_state_file
from megakd.servers.http import JsonServer

TEXT = (5, 8, 30, 2)


def connected(stub: Exporting, **keys: Any) -> StatesServer:
    http, limit_s = JsonServer(stub.url, time_limit_s=30), keys.pop("limit_s", 30)
    return StatesServer(http, stub.folder, width=WIDTH, layers=3, time_limit_s=limit_s)


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Exporting]:
    stub = Exporting(tmp_path)
    with serving(stub):
        yield stub


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "SEEN_WITHIN_S", 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_states_of_every_token_and_the_next_token_come_back(stub, dtype):
    stub.change = lambda tensors: tensors | {"hidden_states": tensors["hidden_states"].to(dtype)}

    answer = connected(stub).states(TEXT, "tiny")

    assert answer.states.dtype == dtype
    assert torch.equal(answer.states.float(), Widths().last_layer(list(TEXT))[:, 0])
    assert answer.following == TEXT[-1] + 3
    stub.spoil = lambda _, tree: tree | {"kv_transfer_params": None}
    with pytest.raises(ServerError, match=r"names no file .*--speculative-config.*--kv-transfer"):
        connected(stub).states(TEXT, "tiny")


def test_many_answers_at_once_are_not_mixed_up_and_leave_nothing(stub: Exporting):
    stub.write_s, stub.busy = 0.05, 3
    server, texts = connected(stub), [(number, number + 1, 7) for number in range(20)]
    began = time.monotonic()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: server.states(text, "tiny"), texts))

    assert [tuple(one.states[:, 0].int().tolist()) for one in answers] == texts
    assert time.monotonic() - began >= stub.write_s  # a file is read when its lock is released
    assert len(set(stub.written)) == 20
    assert not list(stub.folder.iterdir())


def test_the_file_of_a_request_that_arrived_twice_is_deleted_too(stub: Exporting):
    """After a lost connection the request is sent again, and the server has written two files."""
    server = connected(stub)
    once = server._http.post

    def twice(path: str, body: Any) -> Any:
        once(path, body)
        return once(path, body)

    server._http.post = twice  # type: ignore[method-assign]
    server.states(TEXT, "tiny")

    assert len(stub.written) == 2
    assert not list(stub.folder.glob("*.safetensors"))


def test_the_prefix_cache_of_the_server_is_never_hit(stub: Exporting):
    for _ in range(2):
        connected(stub).states(TEXT, "tiny")

    first, second = stub.of("/v1/completions")
    assert first["cache_salt"] != second["cache_salt"]
    assert first["temperature"] == 0
    assert first["max_tokens"] == 1


def change(**changed: Any) -> Any:
    return lambda tensors: {
        name: changed[name](value) if name in changed else value for name, value in tensors.items()
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change(token_ids=lambda t: t.flip(0)), r"4 tokens that differs at position 0 from .* 4"),
        (change(token_ids=lambda t: t[:-1].clone()), "3 tokens that differs at position 3 from"),
        (change(hidden_states=lambda t: t[1:].clone()), "states of 3 tokens, and the text has 4"),
        (
            change(hidden_states=lambda t: t.repeat(1, 2, 1)),
            r"\[4, 2, 6\] .* \[4, 1, 6\] is expected; .*eagle_aux_hidden_state_layer_ids: \[3\]",
        ),
        (change(hidden_states=lambda t: t[..., :5].clone()), r"\[4, 1, 5\] .* \[4, 1, 6\]"),
        (change(hidden_states=lambda t: t.to(torch.float8_e4m3fn)), "states in float8_e4m3fn"),
        (change(hidden_states=lambda t: t.sum()), r"of shape \[\] .* \[4, 1, 6\] is expected"),
        (lambda tensors: {"token_ids": tensors["token_ids"]}, "has no hidden_states"),
    ],
)
def test_a_file_about_something_else_is_refused_and_deleted(stub, changed, message):
    stub.change = changed

    with pytest.raises(ServerError, match=message) as caught:
        connected(stub).states(TEXT, "tiny")

    assert stub.url in str(caught.value)
    assert stub.written[0] in str(caught.value)
    assert not list(stub.folder.iterdir())


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"change": lambda _: None}, r"\.safetensors does not exist"),
        ({"last_bytes": 4}, r"\.safetensors is damaged or cut short"),
        ({"locks": False}, r"\.lock does not exist.* use_synchronization_lock to false"),
    ],
)
def test_a_file_that_does_not_come_whole_is_named(stub, keys, message):
    for name, value in keys.items():
        setattr(stub, name, value)

    with pytest.raises(ServerError, match=message) as caught:
        connected(stub).states(TEXT, "tiny")

    assert str(stub.folder) in str(caught.value)
    assert not list(stub.folder.iterdir())


def test_an_engine_that_ends_before_its_file_is_named_at_once(stub: Exporting):
    """The server has answered already, and the kernel has released the lock."""
    stub.change, stub.dead = lambda _: None, True
    began = time.monotonic()

    message = rf"{stub.url} has ended .*/health answered 503"
    with pytest.raises(ServerError, match=message) as caught:
        connected(stub).states(TEXT, "tiny")

    assert stub.written[0] in str(caught.value)
    assert time.monotonic() - began < 10


def test_files_of_other_requests_stay(stub: Exporting):
    """A server may name its files by a number; one text is in work for another rank."""
    others = [stub.folder / name for name in ("11.safetensors", "11.safetensors.lock")]

    def spoil(path: str, tree: Any) -> Any:
        time.sleep(0.2)  # the file is complete
        given = Path(tree["kv_transfer_params"]["hidden_states_path"]).name
        for end in ("", ".lock"):
            (stub.folder / f"{given}{end}").rename(stub.folder / f"1.safetensors{end}")
        for other in others:
            other.touch()
        return tree | {"kv_transfer_params": {"hidden_states_path": "/server/1.safetensors"}}

    stub.spoil = spoil
    connected(stub).states(TEXT, "tiny")

    assert sorted(stub.folder.iterdir()) == others


def test_a_lock_that_is_never_released_ends_at_the_time_limit(stub: Exporting):
    stub.write_s = 1

    with pytest.raises(ServerError, match="is still being written"):
        connected(stub, limit_s=0.3).states(TEXT, "tiny")


def test_a_file_that_another_node_sees_late_is_read(tmp_path: Path, stub: Exporting):
    file = tmp_path / "late.safetensors"
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(read_state_file, file, time_limit_s=20, check_server=lambda: None)
        time.sleep(0.1)
        stub._publish(file, [1, 2])

        assert result.result()["token_ids"].tolist() == [1, 2]


@pytest.mark.usefixtures("impatient")
def test_a_path_outside_of_the_folder_is_not_followed(stub: Exporting, tmp_path: Path):
    """Only the name of the file counts."""
    outside = tmp_path.parent / "precious.safetensors"
    outside.touch()
    path = {"hidden_states_path": f"{tmp_path}/../{outside.name}"}

    stub.spoil = lambda _, tree: tree | {"kv_transfer_params": path}
    with pytest.raises(ServerError, match="does not exist"):
        connected(stub).states(TEXT, "tiny")

    assert outside.exists()
