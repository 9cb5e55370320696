"""vLLM and SGLang: what is asked, what is understood, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from server_stubs import END, VOCABULARY, Stub, serving

from megakd.contract.completions import Completion, Sampling
from megakd.errors import ServerError
from megakd.servers.http import JsonServer
from megakd.servers.protocol import TextRequest, checked_completion
from megakd.servers.sglang import SglangServer
from megakd.servers.vllm import VllmServer

KINDS = {"vllm": VllmServer, "sglang": SglangServer}
ASKED = {"vllm": "/v1/completions", "sglang": "/generate"}
REQUEST = TextRequest((5, 30), 7, Sampling(8, temperature=0.5), "tiny", (END,))


def connected(stub: Stub) -> Any:
    return KINDS[stub.kind](JsonServer(stub.url, time_limit_s=30, patience_s=0.2))


def completion(stub: Stub, request: TextRequest = REQUEST) -> Completion:
    text = connected(stub).complete(request)
    return checked_completion(text, request, vocabulary=VOCABULARY, url=stub.url)


@pytest.fixture(params=["vllm", "sglang"])
def stub(request: pytest.FixtureRequest) -> Any:
    stub = Stub(request.param)
    with serving(stub):
        yield stub


def text_of(stub: Stub, tree: Any) -> Any:
    return tree["choices"][0] if stub.kind == "vllm" else tree


def set_ids(stub: Stub, ids: list[int], reason: str | None = None) -> None:
    def change(_: str, tree: Any) -> Any:
        text = text_of(stub, tree)
        text["token_ids" if stub.kind == "vllm" else "output_ids"] = ids
        if reason and stub.kind == "vllm":
            text["finish_reason"] = reason
        elif reason:
            text["meta_info"]["finish_reason"] = {"type": reason}
        return tree

    stub.spoil = change


def test_a_text_comes_back_with_its_end_token_or_is_not_finished_at_the_limit(stub: Stub):
    short = REQUEST._replace(sampling=Sampling(2))

    assert completion(stub) == Completion((33, 36, 39, END), finished=True)
    assert completion(stub, short) == Completion((33, 36), finished=False)


def rules_of(stub: Stub) -> dict[str, Any]:
    body = stub.of(ASKED[stub.kind])[0]
    return body if stub.kind == "vllm" else body["sampling_params"]


def test_all_sampling_rules_are_stated(stub: Stub):
    """A server takes rules that are left out from the generation config of its model."""
    sampling = Sampling(8, temperature=0.5, top_p=0.9, top_k=20)

    completion(stub, REQUEST._replace(sampling=sampling, seed=2**62 + 7))

    rules = rules_of(stub)
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.0}
    wanted |= {"repetition_penalty": 1.0, "stop_token_ids": [END], "n": 1}
    assert rules.items() >= wanted.items()
    assert rules.get("seed", 2**62 + 7) == 2**62 + 7
    assert 0 <= rules.get("sampling_seed", 0) < 2**31
    stub.asked.clear()
    completion(stub)
    assert rules_of(stub)["top_k"] == -1  # all tokens may be drawn


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


def other_prompt(stub: Stub, tree: Any) -> Any:
    text_of(stub, tree)["prompt_token_ids"] = [5, 31]
    return tree


def longer_prompt(stub: Stub, tree: Any) -> Any:
    tree.get("usage", tree.get("meta_info"))["prompt_tokens"] = 3
    return tree


def no_object(stub: Stub, tree: Any) -> Any:
    return tree | ({"meta_info": None} if stub.kind == "sglang" else {"choices": [None]})


def two_texts(stub: Stub, tree: Any) -> Any:
    return [tree, tree] if stub.kind == "sglang" else tree | {"choices": tree["choices"] * 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_prompt, "prompt of 2 tokens that differs at position 1"),
        (longer_prompt, "counts 3 tokens in a prompt of 2"),
        (two_texts, "2 texts came back for one prompt"),
        (no_object, "answer (cannot be read|has no dict named meta_info)"),
    ],
)
def test_an_answer_to_another_request_is_refused(stub, change, message):
    stub.spoil = lambda _, tree: change(stub, tree)

    with pytest.raises(ServerError, match=message):
        completion(stub)


def test_a_text_that_the_server_ends_with_another_token_is_refused():
    stub = Stub("vllm")
    set_ids(stub, [33, 36])  # finish_reason stays "stop"
    with serving(stub), pytest.raises(ServerError, match=r"ended by token 36, .* ends .* \[1\]"):
        completion(stub)


def test_an_end_token_that_sglang_leaves_out_is_put_back():
    stub = Stub("sglang")
    set_ids(stub, [33, 36, 39])
    with serving(stub):
        assert completion(stub) == Completion((33, 36, 39, END), finished=True)


def test_an_answer_without_token_numbers_names_the_remedy():
    stub = Stub("vllm")
    stub.spoil = lambda _, tree: tree | {"choices": [tree["choices"][0] | {"token_ids": None}]}
    with serving(stub), pytest.raises(ServerError, match=r"no token_ids.*newer version of vLLM"):
        completion(stub)


def test_the_version_of_an_older_sglang_is_found():
    stub = Stub("sglang")
    with serving(stub):
        answer = stub.answer
        renamed = {"/get_server_info": "/server_info", "/server_info": "/gone"}
        stub.answer = lambda path, body: answer(renamed.get(path, path), body)
        assert connected(stub).describe()[0].version == "0.33.0"
        http = JsonServer(stub.url, time_limit_s=30)
        with pytest.raises(ServerError, match="/version answered 404"):
            VllmServer(http).describe()  # the other kind


def test_adapters_are_loaded_asked_and_unloaded_by_requests_that_may_arrive_twice(tmp_path: Path):
    """vLLM refuses a second load with 400, and a second unload with 404."""
    stub, request = Stub("vllm"), REQUEST._replace(model="run-1")
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
