"""Requests to an inference server of any kind, and the checks of its generated texts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megakd.contract.completions import Completion, Sampling
from megakd.errors import ServerError

LEAST_BIAS = -100.0
"""The smallest number that vLLM adds to a logit; the token is then never drawn in practice."""


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
            "logit_bias": {str(token): LEAST_BIAS for token in self.padding} or None,
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


class TextServer(Protocol):
    """One replica of a server; its methods may run in several threads, and raise `ServerError`."""

    url: str

    def describe(self) -> Sequence[ServedModel]:
        """Return the base models that the server serves; without adapters."""
        ...

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
