"""Probabilities from vLLM servers: what is understood, and answers that are not believed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from server_stubs import VOCABULARY, Counting, Stub, serving

from megakd.errors import ServerError
from megakd.servers.teachers import check_scores, difference
from megakd.servers.vllm import BestTokens, Requirements, VllmServer

TEXT = (5, 8, 30, 2)


def connected(stub: Stub) -> VllmServer:
    return VllmServer(stub.url, time_limit_s=30)


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    with serving(stub):
        yield stub


def test_the_best_tokens_of_every_position_come_in_order(stub: Stub):
    answer = connected(stub).top_k(TEXT, 4, "tiny")

    wanted = Counting().scores(list(TEXT))
    assert len(answer.ids) == len(TEXT) - 1
    for ids, logprobs, values in zip(answer.ids, answer.logprobs, wanted[:-1], strict=True):
        order = sorted(range(VOCABULARY), key=lambda token: -values[token])
        assert ids.tolist() == order[:4]
        assert logprobs == pytest.approx([values[token] for token in order[:4]])


def test_the_own_token_of_the_text_is_no_best_token_if_it_is_unlikely(stub: Stub):
    """vLLM adds it to every position."""
    raw = stub.answer("/v1/completions", {"model": "tiny", "prompt": [5, 39], "prompt_logprobs": 2})

    assert "39" in raw[1]["choices"][0]["prompt_logprobs"][1]
    assert 39 not in connected(stub).top_k((5, 39), 2, "tiny").ids


def test_a_limit_of_the_server_names_its_flag(stub: Stub):
    stub.most_logprobs = 20

    with pytest.raises(ServerError, match=r"greater than max allowed.* --max-logprobs 64"):
        connected(stub).top_k(TEXT, 64, "tiny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda choice: choice["prompt_logprobs"].pop(), "not about the text that was sent"),
        (lambda choice: choice["prompt_logprobs"][2].popitem(), "1 tokens came back .* of 2"),
        (lambda choice: choice.update(prompt_token_ids=[1]), "not about the text that was sent"),
        (
            lambda choice: choice["prompt_logprobs"].__setitem__(2, None),
            "not about the text that was sent",
        ),
        (
            lambda choice: choice["prompt_logprobs"][2].update({"-5": {"logprob": -1.0}}),
            "greater than or equal to 0",
        ),
        (
            lambda choice: choice["prompt_logprobs"][1]["8"].update(logprob=0.5),
            "no log-probabilities of one softmax",
        ),
    ],
)
def test_an_answer_about_something_else_is_refused(stub: Stub, change: Any, message: str):
    stub.spoil = lambda _, tree: (change(tree["choices"][0]), tree)[1]

    with pytest.raises(ServerError, match=message):
        connected(stub).top_k((5, 8, 11, 14), 2, "tiny")


class Other(Counting):
    """A model of other probabilities: the same order, less certain."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def scores(self, prompt: list[int]) -> list[list[float]]:
        return [[value - self.shift for value in values] for values in super().scores(prompt)]


def test_replicas_may_differ_by_rounding_alone(stub: Stub):
    other = Stub(model=Other(0.02))
    with serving(other):
        servers = [connected(stub), connected(other)]
        check_scores(servers, [TEXT], Requirements("tiny", 20, VOCABULARY), 4)
        other.model = Other(0.3)
        with pytest.raises(ServerError, match=r"differ by 0\.300 .* at most 0\.05") as caught:
            check_scores(servers, [TEXT], Requirements("tiny", 20, VOCABULARY), 4)
    assert stub.url in str(caught.value)
    assert other.url in str(caught.value)


def test_a_token_that_the_other_answer_lacks_counts_as_unlikely():
    one = BestTokens(np.array([[1, 2]], np.int32), np.array([[-0.1, -3.0]], np.float32))
    other = BestTokens(np.array([[1, 3]], np.int32), np.array([[-0.1, -2.5]], np.float32))

    assert difference(one, one) == 0
    assert difference(one, other) == pytest.approx(0.25)
