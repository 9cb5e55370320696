"""A teacher whose answers come from inference servers: its most likely tokens at every position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from megakd.contract.batch import IGNORE, Batch, Knowledge, TopK
from megakd.engine.collectives import together
from megakd.errors import ServerError
from megakd.servers.threads import Running

if TYPE_CHECKING:
    from megakd.engine.distributed import Ranks
    from megakd.servers.protocol import BestTokens, ScoringServer

AT_ONCE = 64
"""Requests of a rank that run at the same time."""


class ServedTeacher:
    """A teacher that answers micro-batches of a language model with `TopK`; a collective.

    Each document is a request of its own. The documents of a rank go to all replicas in turn.

    Args:
        servers: the replicas.
        models: the name of the model at each replica.
        top_k: number of tokens per position.
        vocabulary: number of tokens of teacher and student; every token is below this number.
        ranks: this process.
    """

    def __init__(
        self,
        servers: Sequence[ScoringServer],
        models: Sequence[str],
        *,
        top_k: int,
        vocabulary: int,
        ranks: Ranks,
    ) -> None:
        self._servers, self._models = servers, models
        self._top_k, self._vocabulary = top_k, vocabulary
        self._ranks = ranks

    def __call__(self, batch: Batch) -> Knowledge:
        """Return the most likely tokens at the positions of a micro-batch; a collective."""
        return next(self.answers([batch]))

    def answers(self, batches: Sequence[Batch]) -> Iterator[Knowledge]:
        """Yield the answers to every micro-batch of a step, which are asked for together.

        Raises:
            ServerError: a server failed; raised on every rank.
        """
        texts = [_documents(batch) for batch in batches]
        every = [ids for found in texts for _, ids in found]
        calls = [partial(self._asked, number, ids) for number, ids in enumerate(every)]
        said = iter(together(Running(calls, at_once=AT_ONCE).results))
        for batch, found in zip(batches, texts, strict=True):
            yield self._knowledge(batch, [(place, next(said)) for place, _ in found])

    def prefetch(self) -> None:
        """Do nothing: the texts of the next step are not known."""

    def evict(self) -> None:
        """Do nothing."""

    def destroy(self) -> None:
        """Do nothing."""

    def _asked(self, number: int, ids: tuple[int, ...]) -> list[BestTokens]:
        replica = (self._ranks.rank + number) % len(self._servers)
        server = self._servers[replica]
        said = server.top_k(ids, self._top_k, self._models[replica])
        largest = max(max(best.ids) for best in said)
        if largest >= self._vocabulary:
            raise ServerError(
                f"{server.url} knows token {largest}, and teacher and student share "
                f"{self._vocabulary} tokens; the servers serve another model, or top_k is too large"
            )
        return said

    def _knowledge(
        self, batch: Batch, said: Sequence[tuple[tuple[int, int], list[BestTokens]]]
    ) -> Knowledge:
        size = (*batch.valid.shape, self._top_k)
        ids, logprobs = torch.full(size, -1, dtype=torch.int32), torch.zeros(size)  # [B, T, k]
        for (row, first), best in said:
            here = slice(first, first + len(best))
            ids[row, here] = torch.tensor([position.ids for position in best], dtype=torch.int32)
            logprobs[row, here] = torch.tensor([position.logprobs for position in best])
        device = self._ranks.device
        return Knowledge(kept=TopK(ids.to(device), logprobs.to(device)))


def _documents(batch: Batch) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
    """Return the documents of a micro-batch with a prediction: row, first position, and tokens.

    A document that is cut by the end of its row predicts the first token of the next row, which is
    the label of its last position. This token is added, because servers answer up to the token
    before the last.
    """
    ids, valid = batch.inputs["input_ids"].tolist(), batch.valid.tolist()
    positions, labels = batch.inputs["position_ids"].tolist(), batch.labels.tolist()
    found = []
    for row, there in enumerate(valid):
        here = [place for place, is_valid in enumerate(there) if is_valid]
        starts = [place for place in here if positions[row][place] == 0 or place == here[0]]
        for first, stop in pairwise([*starts, *(place + 1 for place in here[-1:])]):
            after = [token for token in labels[row][stop - 1 : stop] if token != IGNORE]
            text = (*ids[row][first:stop], *after)
            if len(text) > 1:
                found.append(((row, first), text))
    return found
