"""Requests to inference servers of any kind, and the checks of the servers and of their answers.

Before a run, servers are checked to serve the model, to fit the texts, to agree, and to be right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megakd.contract.completions import Completion, Sampling
from megakd.errors import ServerError
from megakd.servers.http import JsonServer

PROBE_TOKENS = 16
"""Tokens of the greedy texts that replicas are compared by."""
TIMES = 2
"""How often every replica answers every prompt or text of a check."""
REPEATED, REFERENCE = 0.05, 0.1
"""Largest mean difference of log-probabilities: between answers of servers, and from a local model.

16-bit weights and other batches move log-probabilities of likely tokens by about 0.01; another
model, template or precision of 8 bits moves them by far more.
"""


class ServedModel(NamedTuple):
    """The statements of a server about its model.

    names: all names and paths by which the server states the model.
    version: version of the server's program.
    context: largest number of tokens of prompt and completion; None: not stated.
    weights: version of the weights that the model has now; None: not stated.
    paused: whether the server answers no text until it gets weights; a run was killed while the
        server loaded weights, or the server has failed to load weights.
    """

    name: str
    names: tuple[str, ...]
    version: str
    context: int | None
    weights: str | None = None
    paused: bool = False


class TextRequest(NamedTuple):
    """A prompt to continue.

    model: name of the model, or of the adapter, that continues the prompt.
    end_tokens: the tokens that end a text.
    padding: tokens of the model that are never generated, because no tokenizer knows them.
    """

    prompt: tuple[int, ...]
    seed: int
    sampling: Sampling
    model: str
    end_tokens: tuple[int, ...]
    padding: range = range(0)

    def rules(self) -> dict[str, Any]:
        """Return all sampling rules under the names that vLLM and SGLang share.

        A server takes rules that are not stated from the generation config of its model.
        """
        sampling = self.sampling
        return {
            "n": 1,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1 if sampling.top_k is None else sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(self.end_tokens),
            # The smallest number that vLLM adds to a logit; the token is never drawn in practice.
            "logit_bias": {str(token): -100.0 for token in self.padding} or None,
        }


class ServedText(NamedTuple):
    """The answer of a server to a `TextRequest`, not yet checked.

    ids: the generated tokens, with the token that ended the text.
    reason: why the text ends: `stop`, `length`, or another word of the server.
    prompt, prompt_tokens: the tokens that the server has continued, and their number.
    weights: version of the weights that generated the text. None: not stated, like the prompt.
    """

    ids: tuple[int, ...]
    reason: str
    prompt: tuple[int, ...] | None
    prompt_tokens: int | None = None
    weights: str | None = None


class TextServer(ABC):
    """One replica of a server; its methods may run in several threads, and raise `ServerError`."""

    def __init__(self, http: JsonServer) -> None:
        self._http, self.url = http, http.url

    @abstractmethod
    def describe(self) -> list[ServedModel]:
        """Return the base models that the server serves; without adapters."""

    @abstractmethod
    def complete(self, request: TextRequest) -> ServedText: ...


class BestTokens(NamedTuple):
    """The most likely tokens at the positions of a text, most likely first, in arrays [T, k].

    logprobs: natural logarithms of the softmax over the whole vocabulary.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


class TokenScorer(Protocol):
    """Source of the probabilities of the tokens of a given text."""

    url: str

    def top_k(self, ids: tuple[int, ...], count: int, model: str) -> BestTokens:
        """Return the most likely next tokens after each token of a text but the last."""
        ...


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
    if text.prompt is not None:
        place = first_difference(text.prompt, request.prompt)
        if place is not None:
            raise ServerError(
                f"{url}: the text continues a prompt of {len(text.prompt)} tokens that differs at "
                f"position {place} from the prompt of {len(request.prompt)} tokens that was sent; "
                "the server must not change prompts"
            )
    if text.prompt_tokens not in (None, len(request.prompt)):
        raise ServerError(
            f"{url}: the server counts {text.prompt_tokens} tokens in a prompt of "
            f"{len(request.prompt)}; the server must not change prompts"
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
            f"{request.sampling.max_new_tokens} were asked for; raise the context of the server "
            "(--max-model-len of vLLM, --context-length of SGLang)"
        )
    return bool(ends)


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
    rules = sampling._replace(max_new_tokens=most)
    request = TextRequest(prompt, 0, rules, model.name, wanted.end_tokens, wanted.padding)
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
