"""Teachers whose answers come from inference servers, such as the most likely tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch

from megakd.contract.batch import IGNORE, Batch, Knowledge, TopK
from megakd.engine.collectives import together
from megakd.errors import ServerError
from megakd.servers.threads import Running

if TYPE_CHECKING:
    from megakd.engine.distributed import Ranks
    from megakd.servers.protocol import BestTokens, TokenScorer

Said = TypeVar("Said")
AT_ONCE = 64
"""Requests of a rank that run at the same time."""


class Document(NamedTuple):
    """A document of a micro-batch that is a request.

    row, first: the place of its first token.
    ids: its tokens, as a server gets them.
    """

    row: int
    first: int
    ids: tuple[int, ...]


class ServedTeacher(ABC, Generic[Said]):
    """A teacher whose servers answer micro-batches of a language model; a collective.

    Each document is a request of its own. The documents of a rank go to all replicas in turn.

    Args:
        replicas: number of replicas.
        ranks: this process.
    """

    def __init__(self, replicas: int, ranks: Ranks) -> None:
        self._replicas, self._ranks = replicas, ranks

    @abstractmethod
    def documents(self, batch: Batch) -> list[Document]:
        """Return the documents of a micro-batch that servers are asked about."""

    @abstractmethod
    def ask(self, replica: int, ids: tuple[int, ...]) -> Said:
        """Return the answer of a replica to a document; called from several threads."""

    @abstractmethod
    def knowledge(self, batch: Batch, said: Sequence[tuple[Document, Said]]) -> Knowledge:
        """Return the outputs for a micro-batch from the answers to its documents."""

    def __call__(self, batch: Batch) -> Knowledge:
        """Return the outputs for a micro-batch; a collective."""
        return next(self.answers([batch]))

    def answers(self, batches: Sequence[Batch]) -> Iterator[Knowledge]:
        """Yield the outputs for every micro-batch of a step, which are asked for together.

        Raises:
            ServerError: a server failed; raised on every rank.
        """
        texts = [self.documents(batch) for batch in batches]
        every = [document.ids for found in texts for document in found]
        calls = [
            partial(self.ask, (self._ranks.rank + number) % self._replicas, ids)
            for number, ids in enumerate(every)
        ]
        said = iter(together(Running(calls, at_once=AT_ONCE).results))
        for batch, found in zip(batches, texts, strict=True):
            yield self.knowledge(batch, [(document, next(said)) for document in found])

    def prefetch(self) -> None:
        """Do nothing: the texts of the next step are not known."""

    def evict(self) -> None:
        """Do nothing."""

    def destroy(self) -> None:
        """Do nothing."""


class TopKTeacher(ServedTeacher["BestTokens"]):
    """A served teacher that answers with its most likely tokens at every position (`TopK`).

    Args:
        servers: the replicas.
        models: the name of the model at each replica.
        top_k: number of tokens per position.
        vocabulary: number of tokens of teacher and student; every token is below this number.
        ranks: this process.
    """

    def __init__(
        self,
        servers: Sequence[TokenScorer],
        models: Sequence[str],
        *,
        top_k: int,
        vocabulary: int,
        ranks: Ranks,
    ) -> None:
        super().__init__(len(servers), ranks)
        self._servers, self._models = servers, models
        self._top_k, self._vocabulary = top_k, vocabulary

    def documents(self, batch: Batch) -> list[Document]:
        """Return the documents with a prediction.

        A document that is cut by the end of its row predicts the first token of the next row, which
        is the label of its last position. This token is added, because servers answer up to the
        token before the last.
        """
        ids, labels = batch.inputs["input_ids"].tolist(), batch.labels.tolist()
        found = []
        for row, first, stop in document_spans(batch):
            after = [token for token in labels[row][stop - 1 : stop] if token != IGNORE]
            text = (*ids[row][first:stop], *after)
            if len(text) > 1:
                found.append(Document(row, first, text))
        return found

    def ask(self, replica: int, ids: tuple[int, ...]) -> BestTokens:
        """Return the most likely tokens after each token of a text but the last."""
        server = self._servers[replica]
        said = server.top_k(ids, self._top_k, self._models[replica])
        largest = said.ids.max()
        if largest >= self._vocabulary:
            raise ServerError(
                f"{server.url} knows token {largest}, and teacher and student share "
                f"{self._vocabulary} tokens; the servers serve another model, or top_k is too large"
            )
        return said

    def knowledge(self, batch: Batch, said: Sequence[tuple[Document, BestTokens]]) -> Knowledge:
        """Return the tokens at their positions; see `ServedTeacher`."""
        size = (*batch.valid.shape, self._top_k)
        ids, logprobs = torch.full(size, -1, dtype=torch.int32), torch.zeros(size)  # [B, T, k]
        for (row, first, _), best in said:
            here = slice(first, first + len(best.ids))
            ids[row, here], logprobs[row, here] = map(torch.from_numpy, best)
        device = self._ranks.device
        return Knowledge(kept=TopK(ids.to(device), logprobs.to(device)))


def document_spans(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Yield the documents of a micro-batch: row, first position, and the position after the last.

    Positions restart at 0 with every document.
    """
    positions = batch.inputs["position_ids"].tolist()
    for row, there in enumerate(batch.valid.tolist()):
        here = [place for place, is_valid in enumerate(there) if is_valid]
        starts = [place for place in here if positions[row][place] == 0 or place == here[0]]
        for first, stop in pairwise([*starts, *(place + 1 for place in here[-1:])]):
            yield row, first, stop
