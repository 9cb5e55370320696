"""The check of servers that teach: they give one answer to one text, and it is the right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megakd.errors import ServerError
from megakd.servers.protocol import BestTokens, TokenScorer

if TYPE_CHECKING:
    from numpy.typing import NDArray

TIMES = 2
"""How often every replica answers every text of the check."""
REPEATED, REFERENCE = 0.05, 0.1
"""Largest mean difference of log-probabilities: between answers of servers, and from a local model.

16-bit weights and other batches move log-probabilities of likely tokens by about 0.01; another
model, template or precision of 8 bits moves them by far more.
"""


def check_scores(
    servers: Sequence[TokenScorer],
    models: Sequence[str],
    texts: Sequence[tuple[int, ...]],
    top_k: int,
) -> list[BestTokens]:
    """Return the answers to some texts, after comparing all replicas, each asked `TIMES` times.

    Raises:
        ServerError: two answers differ by more than `REPEATED`, or cannot be used.
    """
    first = [servers[0].top_k(text, top_k, models[0]) for text in texts]
    for server, model in zip(servers, models, strict=True):
        for _ in range(TIMES if server is not servers[0] else TIMES - 1):
            again = [server.top_k(text, top_k, model) for text in texts]
            found = _mean([difference(a, b) for a, b in zip(first, again, strict=True)])
            if found > REPEATED:
                raise ServerError(
                    f"teacher.server: {servers[0].url} and {server.url} differ by {found:.3f} in "
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
    """Compare answers of servers with a local model.

    Args:
        texts: the texts.
        answers: the answers of the servers.
        logprobs_of: function that returns the log-probabilities of the same tokens.
        folder: where the local model comes from, for the message.

    Raises:
        ServerError: the answers differ by more than `REFERENCE`.
    """
    pairs = zip(texts, answers, strict=True)
    found = _mean([np.abs(best.logprobs - logprobs_of(text, best)).mean() for text, best in pairs])
    if found > REFERENCE:
        raise ServerError(
            f"teacher.server: the servers differ by {found:.3f} from {folder} in the mean "
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
