"""Checks before a run: the right model everywhere, room for the texts, and equal replicas."""

from __future__ import annotations

from typing import Any

import pytest
from server_stubs import END, VOCABULARY, Counting, Stub, serving

from megakd.config.rollout import RolloutServerConfig
from megakd.errors import ServerError
from megakd.servers.agreement import Wanted, check_agreement, served_models
from megakd.servers.connect import replicas_of

WANTED = Wanted("tiny", 20, VOCABULARY, (END,))
PROMPTS = [(4, 5), (6, 7, 8), (9,), (2, 3)]


def checked(*stubs: Stub, wanted: Wanted = WANTED) -> None:
    urls = tuple(stub.url for stub in stubs)
    config = RolloutServerConfig(url=urls, push="none", time_limit=30)
    servers = replicas_of(config, patience_s=0.2)
    check_agreement(servers, served_models(servers, wanted), PROMPTS, wanted)


@pytest.fixture
def pair() -> Any:
    stubs = Stub(), Stub()
    with serving(*stubs):
        yield stubs


def test_equal_replicas_pass_and_each_is_asked_twice_per_prompt(pair):
    checked(*pair)

    for stub in pair:
        assert len(stub.of("/v1/completions")) == 2 * len(PROMPTS)
    checked(*pair, wanted=WANTED._replace(name="/models/tiny"))  # the path of the model


class Deviating(Counting):
    """Continues one prompt in another way."""

    def continue_(self, prompt: list[int], rules: dict[str, Any]) -> list[int]:
        ids = super().continue_(prompt, rules)
        return [*ids[:2], 0, *ids[3:]] if prompt == [6, 7, 8] else ids


def test_replicas_that_disagree_are_refused_with_prompt_and_position(pair):
    pair[1].model = Deviating()

    with pytest.raises(ServerError) as caught:
        checked(*pair)

    message = str(caught.value)
    assert f"{pair[0].url} and {pair[1].url} disagree" in message
    assert "prompt 2 (3 tokens, beginning with [6, 7, 8]) differ first at position 2" in message


def test_a_replica_that_disagrees_with_itself_is_refused():
    stub = Stub()

    def end_early(path: str, tree: Any) -> Any:
        if len(stub.of(path)) % 2 and path == "/v1/completions":
            ids = tree["choices"][0]["token_ids"]
            tree["choices"][0] |= {"finish_reason": "stop", "token_ids": [*ids[:3], END]}
        return tree

    stub.spoil = end_early
    with serving(stub), pytest.raises(ServerError, match="answers differently when asked twice"):
        checked(stub)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "big", "path": "/models/big"},
            r"serves .*big.*, and the run needs tiny; start",
        ),
        ({"version": "0.32.1"}, r"has version 0\.32\.1, and .* has version 0\.33\.0"),
        ({"context": 19}, r"context of 19 tokens, and .* have 20"),
    ],
    ids=["model", "version", "context"],
)
def test_a_replica_that_does_not_fit_is_refused(pair, changes, message):
    for name, value in changes.items():
        setattr(pair[1], name, value)

    with pytest.raises(ServerError, match=message):
        checked(*pair)
