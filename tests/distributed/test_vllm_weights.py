"""Training on texts of a vLLM server that gets the whole student before every block of texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served_models import Transformer
from server_stubs import Stub, serving
from test_rollouts import finish, texts_of, weights, write_config
from test_rollouts import texts as texts  # noqa: PLC0414 - a fixture
from test_servers import GREEDY, SHORT, refused, served


def vllm() -> Stub:
    """A vLLM server in development mode whose model is a plain Llama with pushed weights."""
    stub = Stub("vllm", name="student", model=Transformer())
    stub.development = True
    return stub


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = vllm()
    with serving(stub):
        yield stub


def versions_of(stub: Stub) -> list[str]:
    """The numbers of the versions that the server got."""
    named = [body["new_version"] for body in stub.of("/update_weight_version")]
    return [name.rpartition("-")[2] for name in named]


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_run_through_vllm_ends_with_the_weights_of_the_own_engine(launch, texts, tmp_path, zero):
    """Two replicas that are slow, busy at times, and remember the prefixes of earlier texts."""
    stubs = [vllm(), vllm()]
    for stub in stubs:
        stub.busy, stub.delay_s = 3, 0.01
    local = write_config(tmp_path, texts, zero=zero, rollout=GREEDY, train=SHORT)
    own = finish(launch, local, tmp_path / "own")
    with serving(*stubs) as urls:
        keys = GREEDY | served(stubs[0], tmp_path / "w", url=urls)
        config = write_config(tmp_path, texts, zero=zero, rollout=keys, train=SHORT)
        out = finish(launch, config, tmp_path / "out")

    assert texts_of(out) == texts_of(own)
    for stub in stubs:
        assert versions_of(stub) == ["0", "1", "2"]
        assert not stub.paused
    for name, weight in weights(own).items():
        assert torch.equal(weights(out)[name], weight), name


def test_a_vllm_that_was_restarted_between_two_blocks_stops_the_run(launch, texts, stub, tmp_path):
    """The restarted server has the weights of its start, and would answer without complaint."""
    answer, sampled = stub.answer, []

    def restarting(path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/completions" and stub.weights.endswith("-2") and not sampled:
            sampled.append(body)
            stub.restart()
        return answer(path, body)

    stub.answer = restarting
    config = write_config(tmp_path, texts, zero=0, rollout=GREEDY | served(stub, tmp_path / "w"))

    said = refused(launch, config, tmp_path / "out")

    assert "was generated with the weights default, and out-" in said
    assert "the server was restarted" in said
    assert len(texts_of(tmp_path / "out")) == 2


def test_a_vllm_outside_development_mode_is_refused_before_a_model_loads(
    launch, texts, stub, tmp_path
):
    stub.development = False
    config = write_config(tmp_path, texts, zero=0, rollout=GREEDY | served(stub, tmp_path / "w"))

    said = refused(launch, config, tmp_path / "out")

    assert f"{stub.url}/weight_info answered 404" in said
    assert "VLLM_SERVER_DEV_MODE=1" in said
    assert "Traceback" not in said
    assert stub.of("/v1/completions") == []


def test_a_run_that_was_killed_during_a_push_is_resumed(launch, texts, tmp_path):
    """The kill leaves one of two replicas paused, with the weights of the version before."""
    stubs = first, other = [vllm(), vllm()]
    answer = other.answer

    def stuck(path: str, body: Any) -> tuple[int, Any]:
        if path == "/collective_rpc" and body["kwargs"]["weights_path"].endswith("version-3"):
            return 503, {"message": "loading"}
        return answer(path, body)

    other.answer = stuck
    with serving(*stubs) as urls:
        keys = GREEDY | served(first, tmp_path / "w", url=urls)
        config, out = write_config(tmp_path, texts, zero=0, rollout=keys), tmp_path / "out"
        group = launch("--config", str(config), f"output_dir={out}")
        assert group.wait_until(lambda: first.weights.endswith("-3")), group.text
        group.kill()
        written = texts_of(out)
        assert other.paused
        assert other.weights.endswith("-2")
        other.answer = answer

        finish(launch, config, out)

    assert written.items() <= texts_of(out).items()
    local = write_config(tmp_path, texts, zero=0, rollout=GREEDY)
    own = finish(launch, local, tmp_path / "own")
    assert texts_of(out) == texts_of(own)
    for name, weight in weights(own).items():
        assert torch.equal(weights(out)[name], weight), name


def test_a_server_that_cannot_read_the_folder_stops_the_run_before_a_step(
    launch, texts, stub, tmp_path
):
    """The folder is on the node of rank 0 alone."""
    answer = stub.answer

    def elsewhere(path: str, body: Any) -> tuple[int, Any]:
        if path == "/collective_rpc":
            body["kwargs"]["weights_path"] = str(Path("/gone") / "version-0")
        return answer(path, body)

    stub.answer = elsewhere
    config = write_config(tmp_path, texts, zero=0, rollout=GREEDY | served(stub, tmp_path / "w"))

    said = refused(launch, config, tmp_path / "out")

    assert f"{stub.url}/collective_rpc answered 500 and did not load out-" in said
    assert f"-0 from {tmp_path / 'w'}" in said
    assert "Traceback" not in said
