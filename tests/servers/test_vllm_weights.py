"""vLLM servers that get other weights: what is asked, in which order, and what is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_stubs import END, VOCABULARY, Counting, Stub, serving

from megakd.config.rollout import RolloutServerConfig
from megakd.contract.completions import Sampling
from megakd.errors import ServerError
from megakd.servers.agreement import Wanted, check_agreement, served_models
from megakd.servers.connect import replicas_of
from megakd.servers.vllm import TextRequest, VllmServer

REQUEST = TextRequest((5, 30), 7, Sampling(8, temperature=0.0), "tiny", (END,))
WANTED = Wanted("tiny", 20, VOCABULARY, (END,))
CONTROL = ("/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache?reset_external=true")
CONTROL = (*CONTROL, "/update_weight_version", "/resume")


class Loading(Counting):
    """Counts in steps as wide as the name of the folder that was loaded last says."""

    def __init__(self) -> None:
        self.step = 3

    def load(self, folder: Path) -> None:
        self.step = int(folder.name)

    def continue_(self, prompt: list[int], rules: dict[str, Any]) -> list[int]:
        steps = range(1, rules["most"] + 1)
        return [2 + (prompt[-1] - 2 + self.step * k) % (VOCABULARY - 2) for k in steps]  # no END


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub(model=Loading())
    stub.development = True
    with serving(stub):
        yield stub


def connected(*stubs: Stub, push: Any = "full") -> list[Any]:
    urls = tuple(stub.url for stub in stubs)
    config = RolloutServerConfig(url=urls, push=push, time_limit=30)
    return replicas_of(config, patience_s=0.2)


def folder_of(place: Path, step: int) -> Path:
    (place / str(step)).mkdir()
    return place / str(step)


def test_weights_are_read_while_the_server_is_paused_and_stated_by_later_texts(stub, tmp_path):
    (server,) = connected(stub)
    before = server.complete(REQUEST)

    folder = folder_of(tmp_path, 5)
    server.load_weights(folder, "run-4")

    after = server.complete(REQUEST)
    assert (before.ids[:2], before.weights) == ((33, 36), "default")
    assert (after.ids[:2], after.weights) == ((35, 2), "run-4")
    assert tuple(path for path, _ in stub.asked if path in CONTROL) == CONTROL
    call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    assert stub.of("/collective_rpc") == [call]
    assert server.describe()[0].weights == "run-4"


@pytest.mark.parametrize("deaf", ["/pause?mode=wait", "/reset_prefix_cache?reset_external=true"])
def test_no_text_comes_from_prefixes_of_earlier_weights(stub, tmp_path, deaf):
    """Each of the two requests empties the cache; a server may ignore one of them."""
    answer = stub.answer
    silent = {"success": True, "status": "paused"}
    stub.answer = lambda path, body: (200, silent) if path == deaf else answer(path, body)
    (server,) = connected(stub)
    server.complete(REQUEST)

    server.load_weights(folder_of(tmp_path, 5), "run-4")

    assert server.complete(REQUEST).ids[:2] == (35, 2)


@pytest.mark.parametrize(
    ("is_paused", "ids", "weights"),
    [(False, (33, 36), "default"), (True, (35, 2), "run-4")],
    ids=["in work", "asked for meanwhile"],
)
def test_texts_in_work_are_finished_with_their_weights_and_later_ones_wait_for_the_new(
    stub, tmp_path, is_paused, ids, weights
):
    stub.delay_s, stub.paused = 0.0 if is_paused else 0.2, is_paused
    (server,), result = connected(stub), []
    texts = threading.Thread(target=lambda: result.append(server.complete(REQUEST)))
    texts.start()
    while not (stub.of("/v1/completions") if is_paused else stub.at_once):
        time.sleep(0.01)

    server.load_weights(folder_of(tmp_path, 5), "run-4")
    texts.join()

    assert (result[0].ids[:2], result[0].weights) == (ids, weights)


def test_a_folder_that_the_server_does_not_read_is_named_with_replica_and_version(stub, tmp_path):
    (server,) = connected(stub)

    with pytest.raises(ServerError) as caught:
        server.load_weights(tmp_path / "gone", "run-4")

    message = str(caught.value)
    refused = f"{stub.url}/collective_rpc answered 500 and did not load run-4 from {tmp_path}"
    for part in (refused, "Call to collective_rpc method failed", "the server is paused now"):
        assert part in message
    # The weights may be incomplete: no text may come from them.
    assert stub.paused
    assert stub.weights == "default"

    server.load_weights(folder_of(tmp_path, 5), "run-4")
    assert server.complete(REQUEST).weights == "run-4"


def test_a_cache_that_is_not_emptied_is_refused_before_the_server_goes_on(stub, tmp_path):
    stub.spoil = lambda path, tree: {"success": False} if path.startswith("/reset") else tree

    with pytest.raises(ServerError, match="did not empty the cache of prefixes"):
        connected(stub)[0].load_weights(folder_of(tmp_path, 5), "run-4")

    assert stub.paused


def test_a_server_outside_development_mode_names_the_variable(stub, tmp_path):
    stub.development = False
    (server,) = connected(stub)

    for action in (server.describe, lambda: server.load_weights(tmp_path, "run-4")):
        with pytest.raises(ServerError, match=r"answered 404; .* variable VLLM_SERVER_DEV_MODE=1"):
            action()


def test_texts_state_the_versions_of_their_weights_if_weights_are_pushed(stub):
    spans = [{"version": "run-4", "start": 0, "end": 3}, {"version": "run-5", "start": 3, "end": 8}]
    stated: list[Any] = [spans]

    def spoil(path: str, tree: Any) -> Any:
        if path == "/v1/completions":
            tree["choices"][0]["weight_versions"] = stated[-1]
        return tree

    stub.spoil = spoil
    assert connected(stub)[0].complete(REQUEST).weights == "run-4, run-5"
    for none in (None, []):
        stated.append(none)
        with pytest.raises(ServerError, match=r"no weight_versions.*from 0\.33 on"):
            connected(stub)[0].complete(REQUEST)
    # Nothing is pushed here: any version will do, without development mode.
    stub.development = False
    (plain,) = connected(stub, push="none")
    assert type(plain) is VllmServer
    assert plain.complete(REQUEST).weights is None
    assert [model.name for model in plain.describe()] == ["tiny"]


def test_replicas_are_compared_only_if_they_state_the_same_weights(stub):
    """A run was killed after one of two replicas had got new weights."""
    other = Stub(model=Loading())
    other.development, other.model.step, other.weights = True, 5, "run-4"
    with serving(other):
        servers = connected(stub, other)
        check_agreement(servers, served_models(servers, WANTED), [(4, 5)], WANTED)
        other.weights = "default"
        with pytest.raises(ServerError, match="disagree"):
            check_agreement(servers, served_models(servers, WANTED), [(4, 5)], WANTED)
