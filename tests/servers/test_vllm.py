"""vLLM servers: what is asked, what is understood, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from server_stubs import END, VOCABULARY, Stub, serving

from megakd.contract.completions import Completion, Sampling
from megakd.errors import ServerError
from megakd.servers.agreement import checked_completion
from megakd.servers.http import JsonServer
from megakd.servers.vllm import TextRequest, VllmServer

REQUEST = TextRequest((5, 30), 7, Sampling(8, temperature=0.5), "tiny", (END,))


def connected(stub: Stub) -> VllmServer:
    return VllmServer(JsonServer(stub.url, time_limit_s=30, patience_s=0.2))


def completion(stub: Stub, request: TextRequest = REQUEST) -> Completion:
    text = connected(stub).complete(request)
    return checked_completion(text, request, vocabulary=VOCABULARY, url=stub.url)


@pytest.fixture
def stub() -> Any:
    stub = Stub()
    with serving(stub):
        yield stub


def set_ids(stub: Stub, ids: list[int], reason: str | None = None) -> None:
    def change(_: str, tree: Any) -> Any:
        tree["choices"][0] |= {"token_ids": ids} | ({"finish_reason": reason} if reason else {})
        return tree

    stub.spoil = change


def test_a_text_comes_back_with_its_end_token_or_is_not_finished_at_the_limit(stub: Stub):
    short = REQUEST._replace(sampling=Sampling(2))

    assert completion(stub) == Completion((33, 36, 39, END), finished=True)
    assert completion(stub, short) == Completion((33, 36), finished=False)


def test_all_sampling_rules_are_stated(stub: Stub):
    """A server takes rules that are left out from the generation config of its model."""
    sampling = Sampling(8, temperature=0.5, top_p=0.9, top_k=20)

    completion(stub, REQUEST._replace(sampling=sampling, seed=2**62 + 7))

    rules = stub.of("/v1/completions")[0]
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.0}
    wanted |= {"repetition_penalty": 1.0, "stop_token_ids": [END], "n": 1}
    assert rules.items() >= (wanted | {"seed": 2**62 + 7}).items()
    stub.asked.clear()
    completion(stub)
    assert stub.of("/v1/completions")[0]["top_k"] == -1  # all tokens may be drawn


@pytest.mark.parametrize(
    ("ids", "reason", "message"),
    [
        ([33] * 8 + [END] * 2, None, "a text of 10 tokens came back, and 1 to 8 were asked for"),
        ([33, None, END], None, "holds None, which is no token number"),
        ([33, -5, END], None, "holds -5, which is no token number"),
        ([33, VOCABULARY, END], None, "token 40, and the student and its tokenizer have 40 tokens"),
        ([33, END, 36, 39], None, "goes on after the end token 1 at position 1"),
        ([33], "abort", r"broken off \(finish_reason abort\)"),
        ([33, 36], "length", "was cut after 2 tokens, and 8 were asked for"),
    ],
)
def test_an_answer_of_other_tokens_than_asked_for_is_refused(stub, ids, reason, message):
    set_ids(stub, ids, reason)

    with pytest.raises(ServerError, match=message):
        completion(stub)


def other_prompt(tree: Any) -> Any:
    tree["choices"][0]["prompt_token_ids"] = [5, 31]
    return tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_prompt, "prompt of 2 tokens that differs at position 1"),
        (lambda tree: tree | {"choices": tree["choices"] * 2}, "2 texts came back for one prompt"),
        (lambda tree: tree | {"choices": [None]}, "answer cannot be read"),
    ],
)
def test_an_answer_to_another_request_is_refused(stub, change, message):
    stub.spoil = lambda _, tree: change(tree)

    with pytest.raises(ServerError, match=message):
        completion(stub)


def test_a_text_that_the_server_ends_with_another_token_is_refused():
    stub = Stub()
    set_ids(stub, [33, 36])  # finish_reason stays "stop"
    with serving(stub), pytest.raises(ServerError, match=r"ended by token 36, .* ends .* \[1\]"):
        completion(stub)


@pytest.mark.parametrize("missing", ["token_ids", "prompt_token_ids"])
def test_an_answer_without_token_numbers_names_the_remedy(stub: Stub, missing: str):
    stub.spoil = lambda _, tree: tree | {"choices": [tree["choices"][0] | {missing: None}]}
    with pytest.raises(ServerError, match=r"no token_ids.*newer version of vLLM"):
        completion(stub)


def test_another_program_at_the_address_is_refused(stub: Stub):
    answer = stub.answer
    stub.answer = lambda path, body: answer("/gone" if path == "/version" else path, body)

    with pytest.raises(ServerError, match="/version answered 404"):
        connected(stub).describe()


def test_adapters_are_loaded_asked_and_unloaded_by_requests_that_may_arrive_twice(tmp_path: Path):
    """vLLM refuses a second load with 400, and a second unload with 404."""
    stub, request = Stub(), REQUEST._replace(model="run-1")
    stub.lost = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
    with serving(stub):
        server = VllmServer(JsonServer(stub.url, time_limit_s=30))
        server.load_adapter("run-1", tmp_path)
        assert server.adapters() == ["run-1"]
        assert [model.name for model in server.describe()] == ["tiny"]
        assert completion(stub, request).finished
        server.unload_adapter("run-1")
        with pytest.raises(ServerError, match="`run-1` does not exist"):
            completion(stub, request)
        answer = stub.answer
        stub.answer = lambda path, body: answer(path.replace("/v1/load", "/gone"), body)
        with pytest.raises(ServerError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            server.load_adapter("run-2", tmp_path)
    assert len(stub.of("/v1/load_lora_adapter")) == len(stub.of("/v1/unload_lora_adapter")) == 2
