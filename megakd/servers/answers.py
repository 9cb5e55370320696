"""Checks of generated texts: a server must have followed the request exactly."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.contract.rollouts import Completion
from megakd.errors import ServerError
from megakd.servers.protocol import ServedText, TextRequest


def checked_completion(
    text: ServedText, request: TextRequest, *, vocabulary: int, url: str
) -> Completion:
    """Return the completion of a prompt, after checking the answer of a server.

    Args:
        text: the answer.
        request: the request.
        vocabulary: number of tokens of the student and of its tokenizer.
        url: address of the server, for messages.

    Raises:
        ServerError: the answer continues another prompt, is too long, has no tokens or unknown
            tokens, or did not end as requested.
    """
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
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))


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
    """Return whether the text ends with an end token, which must be its only end token."""
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
