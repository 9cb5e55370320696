"""Texts of servers: which replica gets which prompt, how many at once, and with which weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from server_stubs import END, VOCABULARY, Stub, serving

from megakd.config.rollout import RolloutServerConfig
from megakd.contract.completions import Completion, RemoteGenerator, Sampling
from megakd.errors import ServerError
from megakd.servers.checks import Wanted
from megakd.servers.connect import Pushed, ServerGenerator, replicas_of

PROMPTS = [[5], [8], [11], [14], [17]]
SAMPLING = Sampling(3, temperature=0.7)


@pytest.fixture(params=["vllm", "sglang"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Stub, Stub]]:
    stubs = Stub(request.param), Stub(request.param)
    with serving(*stubs):
        yield stubs


class Pushes:
    """Pushes nothing, and says what was pushed."""

    def __init__(self, pushed: Pushed) -> None:
        self.pushed, self.versions = pushed, []

    def push(self, version: int) -> Pushed:
        self.versions.append(version)
        return self.pushed


def generator(stubs: Any, *, rank: int = 0, at_once: int = 8, push: Any = None) -> ServerGenerator:
    urls = tuple(stub.url for stub in stubs)
    config = RolloutServerConfig(url=urls, kind=stubs[0].kind, push="none", time_limit=30)
    return ServerGenerator(
        replicas_of(config),
        models=[stub.name for stub in stubs],
        push=push,
        wanted=Wanted("tiny", None, 64, VOCABULARY, (END,)),
        place=(rank, at_once),
    )


def prompts_of(stub: Stub) -> list[list[int]]:
    """The prompts that a replica was asked to continue, sorted."""
    if stub.kind == "vllm":
        return sorted(body["prompt"] for body in stub.of("/v1/completions"))
    return sorted(body["input_ids"] for body in stub.of("/generate"))


@pytest.mark.parametrize("rank", [0, 1])
def test_prompts_go_to_all_replicas_in_turn_and_answers_keep_their_order(pair, rank):
    made = generator(pair, rank=rank)
    assert isinstance(made, RemoteGenerator)

    said = made.generate(PROMPTS, range(5), SAMPLING)

    assert said == [Completion((p + 3, p + 6, p + 9), finished=False) for (p,) in PROMPTS]
    own, other = pair[rank], pair[1 - rank]
    assert prompts_of(own) == PROMPTS[::2]
    assert prompts_of(other) == PROMPTS[1::2]


def test_each_text_gets_its_own_seed_and_few_requests_run_at_once(pair):
    pair[0].delay_s = 0.05

    generator(pair[:1], at_once=2).generate(PROMPTS, [10, 20, 30, 40, 50], SAMPLING)

    asked = pair[0].of("/v1/completions") or pair[0].of("/generate")
    rules = [body.get("sampling_params", body) for body in asked]
    assert sorted(r.get("seed", r.get("sampling_seed")) for r in rules) == [10, 20, 30, 40, 50]
    assert pair[0].most_at_once <= 2
    assert generator(pair[1:]).generate([], [], SAMPLING) == []
    assert prompts_of(pair[1]) == []


def test_a_version_is_pushed_once(pair):
    push = Pushes(Pushed())
    made = generator(pair, push=push)

    for version in (0, 0, 1, 1, 2):
        made.update(version)

    assert push.versions == [0, 1, 2]


def test_an_answer_with_other_weights_than_the_pushed_is_refused():
    stub = Stub("sglang")
    with serving(stub):
        made = generator([stub], push=Pushes(Pushed(weights="run-4")))
        made.update(4)
        with pytest.raises(ServerError, match="with the weights default, and run-4 were pushed"):
            made.generate(PROMPTS, range(5), SAMPLING)
        stub.weights = "run-4"
        assert len(made.generate(PROMPTS, range(5), SAMPLING)) == 5


def test_texts_are_asked_of_the_pushed_adapter():
    stub = Stub("vllm")
    stub.loaded = {"run-4": "w"}
    with serving(stub):
        made = generator([stub], push=Pushes(Pushed(adapter="run-4")))
        made.update(4)
        made.generate(PROMPTS, range(5), SAMPLING)

    assert {body["model"] for body in stub.of("/v1/completions")} == {"run-4"}


def test_a_replica_that_fails_is_named(pair):
    pair[1].spoil = lambda *_: {"choices": [], "meta_info": {}}

    with pytest.raises(ServerError, match=pair[1].url):
        generator(pair).generate(PROMPTS, range(5), SAMPLING)
