"""The requirements of a run on its servers, and the checks of servers and of their texts.

Before a run, servers are checked to serve the model, to fit the texts, and to agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from megakd.contract.completions import Completion, Sampling
from megakd.errors import ServerError
from megakd.servers.vllm import ServedModel, ServedText, TextRequest, VllmServer

PROBE_TOKENS = 16
"""Tokens of the greedy texts that replicas are compared by."""
TIMES = 2
"""How often every replica answers every prompt or text of a check."""


class Wanted(NamedTuple):
    """The requirements of a run on its servers.

    name: the name or the path of the model.
    longest: tokens of the longest prompt and its text.
    vocabulary: number of tokens that the models and the tokenizer have.
    end_tokens: the tokens that end a text.
    padding: further tokens of the served model, which are never generated.
    """

    name: str
    longest: int
    vocabulary: int
    end_tokens: tuple[int, ...]
    padding: range = range(0)


def checked_completion(
    text: ServedText, request: TextRequest, *, vocabulary: int, url: str
) -> Completion:
    """Return the completion of a prompt, after checking the answer of a server."""
    _check_prompt(text, request, url)
    ids, most = text.ids, request.sampling.max_new_tokens
    if not 0 < len(ids) <= most:
        raise ServerError(
            f"{url}: a text of {len(ids)} tokens came back, and 1 to {most} were asked for"
        )
    strange = next((token for token in ids if not 0 <= token < vocabulary), None)
    if strange is not None:
        raise ServerError(
            f"{url}: the text holds token {strange}, and the student and its tokenizer have "
            f"{vocabulary} tokens; the server serves a model with another vocabulary"
        )
    return Completion(ids, finished=_is_finished(text, request, url))


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the first position at which two sequences differ; None if they are equal."""
    pairs = enumerate(zip_longest(one, other))
    return next((position for position, (a, b) in pairs if a != b), None)


def _check_prompt(text: ServedText, request: TextRequest, url: str) -> None:
    place = first_difference(text.prompt, request.prompt)
    if place is not None:
        raise ServerError(
            f"{url}: the text continues a prompt of {len(text.prompt)} tokens that differs at "
            f"position {place} from the prompt of {len(request.prompt)} tokens that was sent; the "
            "server must not change prompts"
        )


def _is_finished(text: ServedText, request: TextRequest, url: str) -> bool:
    # The end token must be the only one.
    ends = [place for place, token in enumerate(text.ids) if token in request.end_tokens]
    last = len(text.ids) - 1
    if ends and ends[0] != last:
        raise ServerError(
            f"{url}: the text goes on after the end token {text.ids[ends[0]]} at position "
            f"{ends[0]}; the server must stop at the tokens {list(request.end_tokens)}"
        )
    if text.reason == "stop" and not ends:
        raise ServerError(
            f"{url}: the text was ended by token {text.ids[-1]}, and the student ends texts with "
            f"{list(request.end_tokens)}; the generation config of the served model has other end "
            "tokens: correct eos_token_id in the folder of one of the two models"
        )
    if text.reason not in {"stop", "length"}:
        raise ServerError(f"{url}: the text was broken off (finish_reason {text.reason})")
    if text.reason == "length" and not ends and len(text.ids) < request.sampling.max_new_tokens:
        raise ServerError(
            f"{url}: the text was cut after {len(text.ids)} tokens, and "
            f"{request.sampling.max_new_tokens} were asked for; start vLLM with a larger "
            "--max-model-len"
        )
    return bool(ends)


def served_models(servers: Sequence[VllmServer], wanted: Wanted) -> list[ServedModel]:
    """Return the model of every replica, after checking that all replicas serve the same model."""
    models = [_served(server, wanted) for server in servers]
    for server, model in zip(servers, models, strict=True):
        if model.version != models[0].version:
            raise ServerError(
                f"{server.url} has version {model.version}, and "
                f"{servers[0].url} has version {models[0].version}; use one version"
            )
        if model.context < wanted.longest:
            raise ServerError(
                f"{server.url} has a context of {model.context} tokens, and the longest prompt and "
                f"its text have {wanted.longest}; start the server with a larger context, or "
                "shorten the texts"
            )
    return models


def _served(server: VllmServer, wanted: Wanted) -> ServedModel:
    models = server.describe()
    for model in models:
        if any(_is_same(name, wanted.name) for name in model.names):
            return model
    named = ", ".join(sorted({name for model in models for name in model.names})) or "no model"
    raise ServerError(
        f"{server.url} serves {named}, and the run needs {wanted.name}; start the server with "
        "that model, or set server.model to the name of the served model"
    )


def _is_same(name: str, wanted: str) -> bool:
    place = Path(name)
    return name == wanted or (place.exists() and place.resolve() == Path(wanted).resolve())


def check_agreement(
    servers: Sequence[VllmServer],
    models: Sequence[ServedModel],
    prompts: Sequence[tuple[int, ...]],
    wanted: Wanted,
) -> None:
    """Compare the greedy texts of all replicas, each asked `TIMES` times, one text at a time.

    Replicas that state different weights are not compared with each other, and paused replicas are
    not asked: some have weights that an interrupted run has pushed, and all get new weights before
    the first text.
    """
    greedy = Sampling(PROBE_TOKENS, temperature=0.0)
    for number, prompt in enumerate(prompts):
        first: dict[str | None, tuple[str, tuple[int, ...]]] = {}
        for server, model in zip(servers, models, strict=True):
            for _ in range(0 if model.paused else TIMES):
                ids = _continued(server, model, prompt, wanted, greedy)
                other, text = first.setdefault(model.weights, (server.url, ids))
                place = first_difference(text, ids)
                if place is not None:
                    twice = f"{other} answers differently when asked twice"
                    pair = f"{other} and {server.url} disagree" if other != server.url else twice
                    raise ServerError(
                        f"{pair}: the greedy texts for prompt {number + 1} ({len(prompt)} tokens, "
                        f"beginning with {list(prompt[:8])}) differ first at position {place}; "
                        "check that all replicas serve the same weights in the same precision, and "
                        "that nobody else uses them"
                    )


def check_sampling(
    servers: Sequence[VllmServer],
    models: Sequence[ServedModel],
    prompt: tuple[int, ...],
    wanted: Wanted,
    sampling: Sampling,
) -> None:
    """Let every replica that is not paused continue a prompt by the sampling rules of the run."""
    for server, model in zip(servers, models, strict=True):
        if not model.paused:
            _continued(server, model, prompt, wanted, sampling)


def _continued(
    server: VllmServer,
    model: ServedModel,
    prompt: tuple[int, ...],
    wanted: Wanted,
    sampling: Sampling,
) -> tuple[int, ...]:
    most = min(PROBE_TOKENS, wanted.longest - len(prompt))
    rules = sampling._replace(max_new_tokens=most)
    request = TextRequest(prompt, 0, rules, model.name, wanted.end_tokens, wanted.padding)
    text = server.complete(request)
    return checked_completion(text, request, vocabulary=wanted.vocabulary, url=server.url).ids
