"""The checks of servers before a run: they serve the model, fit the texts, agree, and are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megakd.contract.completions import Sampling
from megakd.errors import ServerError
from megakd.servers.protocol import (
    BestTokens,
    ServedModel,
    TextRequest,
    TextServer,
    TokenScorer,
    checked_completion,
    first_difference,
)

PROBE_TOKENS = 16
"""Tokens of the greedy texts that replicas are compared by."""
TIMES = 2
"""How often every replica answers every prompt or text of a check."""
REPEATED, REFERENCE = 0.05, 0.1
"""Largest mean difference of log-probabilities: between answers of servers, and from a local model.

16-bit weights and other batches move log-probabilities of likely tokens by about 0.01; another
model, template or precision of 8 bits moves them by far more.
"""


class Wanted(NamedTuple):
    """The requirements of a run on its servers.

    name: the name or the path of the model.
    pushed: folder of pushed weights, which a server states as its model after a push; None: no
        weights are pushed.
    longest: tokens of the longest prompt and its text.
    vocabulary: number of tokens that the models and the tokenizer have.
    end_tokens: the tokens that end a text.
    padding: further tokens of the served model, which are never generated.
    """

    name: str
    pushed: Path | None
    longest: int
    vocabulary: int
    end_tokens: tuple[int, ...]
    padding: range = range(0)

    def request(
        self, prompt: tuple[int, ...], seed: int, sampling: Sampling, model: str
    ) -> TextRequest:
        return TextRequest(prompt, seed, sampling, model, self.end_tokens, self.padding)


def served_models(servers: Sequence[TextServer], wanted: Wanted) -> list[ServedModel]:
    """Return the model of every replica, after checking that all replicas serve the same model."""
    models = [_served(server, wanted) for server in servers]
    for server, model in zip(servers, models, strict=True):
        if model.version != models[0].version:
            raise ServerError(
                f"{server.url} has version {model.version}, and "
                f"{servers[0].url} has version {models[0].version}; use one version"
            )
        if model.context is not None and model.context < wanted.longest:
            raise ServerError(
                f"{server.url} has a context of {model.context} tokens, and the longest prompt and "
                f"its text have {wanted.longest}; start the server with a larger context, or "
                "shorten the texts"
            )
    return models


def _served(server: TextServer, wanted: Wanted) -> ServedModel:
    models = server.describe()
    for model in models:
        if any(_is_same(name, wanted) for name in model.names):
            return model
    named = ", ".join(sorted({name for model in models for name in model.names})) or "no model"
    raise ServerError(
        f"{server.url} serves {named}, and the run needs {wanted.name}; start the server with "
        "that model, or set server.model to the name of the served model"
    )


def _is_same(name: str, wanted: Wanted) -> bool:
    if name == wanted.name:
        return True
    if wanted.pushed is not None and Path(name).is_relative_to(wanted.pushed):
        return True  # an earlier run, or this run before it was resumed, has pushed weights
    return Path(name).exists() and Path(name).resolve() == Path(wanted.name).resolve()


def check_agreement(
    servers: Sequence[TextServer],
    models: Sequence[ServedModel],
    prompts: Sequence[tuple[int, ...]],
    wanted: Wanted,
) -> None:
    """Compare the greedy texts of all replicas, each asked `TIMES` times, one text at a time.

    Replicas that state different models or weights are not compared with each other, and paused
    replicas are not asked: some have weights that an interrupted run has pushed, and all get new
    weights before the first text.
    """
    greedy = Sampling(PROBE_TOKENS, temperature=0.0)
    for number, prompt in enumerate(prompts):
        first: dict[tuple[str | None, ...], tuple[str, tuple[int, ...]]] = {}
        for server, model in zip(servers, models, strict=True):
            for _ in range(0 if model.paused else TIMES):
                ids = _continued(server, model, prompt, wanted, greedy)
                other, text = first.setdefault((*model.names, model.weights), (server.url, ids))
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
    servers: Sequence[TextServer],
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
    server: TextServer,
    model: ServedModel,
    prompt: tuple[int, ...],
    wanted: Wanted,
    sampling: Sampling,
) -> tuple[int, ...]:
    most = min(PROBE_TOKENS, wanted.longest - len(prompt))
    request = wanted.request(prompt, 0, sampling._replace(max_new_tokens=most), model.name)
    text = server.complete(request)
    return checked_completion(text, request, vocabulary=wanted.vocabulary, url=server.url).ids


def check_scores(
    servers: Sequence[TokenScorer],
    models: Sequence[str],
    texts: Sequence[tuple[int, ...]],
    top_k: int,
) -> list[BestTokens]:
    """Return the answers to some texts, after comparing all replicas, each asked `TIMES` times."""
    first = [servers[0].top_k(text, top_k, models[0]) for text in texts]
    for server, model in zip(servers, models, strict=True):
        for _ in range(TIMES if server is not servers[0] else TIMES - 1):
            again = [server.top_k(text, top_k, model) for text in texts]
            gap = _mean([difference(a, b) for a, b in zip(first, again, strict=True)])
            if gap > REPEATED:
                raise ServerError(
                    f"teacher.server: {servers[0].url} and {server.url} differ by {gap:.3f} in "
                    f"the mean log-probability of the best tokens of {len(texts)} texts, and at "
                    f"most {REPEATED} is expected; check that all replicas serve the same weights"
                )
    return first


def check_reference(
    texts: Sequence[tuple[int, ...]],
    answers: Sequence[BestTokens],
    logprobs_of: Callable[[tuple[int, ...], BestTokens], NDArray[np.float32]],
    folder: object,
) -> None:
    """Compare answers of servers with a local model, which gives `logprobs_of` the same tokens."""
    pairs = zip(texts, answers, strict=True)
    gap = _mean([np.abs(best.logprobs - logprobs_of(text, best)).mean() for text, best in pairs])
    if gap > REFERENCE:
        raise ServerError(
            f"teacher.server: the servers differ by {gap:.3f} from {folder} in the mean "
            f"log-probability of the best tokens of {len(texts)} texts, and at most {REFERENCE} is "
            "expected; check that the servers serve that model"
        )


def difference(one: BestTokens, other: BestTokens) -> float:
    """Return the mean absolute difference of log-probabilities over the best tokens of `one`.

    A token that `other` lacks has at most the smallest log-probability of `other`.
    """
    known = [dict(zip(*at, strict=True)) for at in zip(*map(np.ndarray.tolist, other), strict=True)]
    others = [
        [logprobs.get(token, min(logprobs.values())) for token in ids]
        for ids, logprobs in zip(one.ids.tolist(), known, strict=True)
    ]
    return float(np.abs(one.logprobs - np.array(others)).mean())


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / max(len(values), 1)
