"""Teachers whose most likely tokens come from inference servers.

They are checked before a run loads any model, and opened for its stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from megakd.config.rollout import TeacherServerConfig
from megakd.contract.batch import IGNORE, Batch, Knowledge, TopK
from megakd.contract.tasks import STUDENT
from megakd.engine.collectives import on_main, together
from megakd.engine.distributed import Ranks
from megakd.errors import ServerError
from megakd.inputs.inputs import RunInputs
from megakd.servers.agreement import TIMES, Wanted, served_models
from megakd.servers.connect import model_names, replicas_of
from megakd.servers.http import FIRST_PATIENCE_S, RunningCalls
from megakd.servers.vllm import BestTokens, VllmServer

AT_ONCE = 64
"""Requests of a rank that run at the same time."""
CHECKED_ROWS = 8
"""Training rows that the servers answer before the run."""
REPEATED = 0.05
"""Largest mean difference of log-probabilities between answers of servers.

16-bit weights and other batches move log-probabilities of likely tokens by about 0.01; another
model, template or precision of 8 bits moves them by far more.
"""


class Document(NamedTuple):
    """A document of a micro-batch that is a request, and the place of its first token."""

    row: int
    first: int
    ids: tuple[int, ...]


class ServedTeacher:
    """A teacher whose servers answer with their most likely tokens at every position (`TopK`).

    Each document is a request of its own. The documents of a rank go to all replicas in turn. All
    tokens are below `vocabulary`, which teacher and student share. Every call is a collective.
    """

    def __init__(
        self,
        servers: Sequence[VllmServer],
        models: Sequence[str],
        *,
        top_k: int,
        vocabulary: int,
        ranks: Ranks,
    ) -> None:
        self._servers, self._models, self._ranks = servers, models, ranks
        self._top_k, self._vocabulary = top_k, vocabulary

    def __call__(self, batch: Batch) -> Knowledge:
        return next(self.answers([batch]))

    def answers(self, batches: Sequence[Batch]) -> Iterator[Knowledge]:
        """Yield the outputs for every micro-batch of a step, which are asked for together."""
        texts = [_documents(batch) for batch in batches]
        every = [document.ids for documents in texts for document in documents]
        calls = [
            partial(self._ask, (self._ranks.rank + number) % len(self._servers), ids)
            for number, ids in enumerate(every)
        ]
        answers = iter(together(RunningCalls(calls, at_once=AT_ONCE).results))
        for batch, documents in zip(batches, texts, strict=True):
            yield self._knowledge(batch, [(document, next(answers)) for document in documents])

    def _ask(self, replica: int, ids: tuple[int, ...]) -> BestTokens:
        server = self._servers[replica]
        best = server.top_k(ids, self._top_k, self._models[replica])
        largest = best.ids.max()
        if largest >= self._vocabulary:
            raise ServerError(
                f"{server.url} knows token {largest}, and teacher and student share "
                f"{self._vocabulary} tokens; the servers serve another model, or top_k is too large"
            )
        return best

    def _knowledge(self, batch: Batch, answers: Sequence[tuple[Document, BestTokens]]) -> Knowledge:
        size = (*batch.valid.shape, self._top_k)
        ids, logprobs = torch.full(size, -1, dtype=torch.int32), torch.zeros(size)  # [B, T, k]
        for (row, first, _), best in answers:
            here = slice(first, first + len(best.ids))
            ids[row, here], logprobs[row, here] = map(torch.from_numpy, best)
        device = self._ranks.device
        return Knowledge(kept=TopK(ids.to(device), logprobs.to(device)))

    def prefetch(self) -> None: ...  # the texts of the next step are not known

    def evict(self) -> None: ...

    def destroy(self) -> None: ...


def _documents(batch: Batch) -> list[Document]:
    # The documents with a prediction. A document that is cut by the end of its row predicts the
    # first token of the next row, which is the label of its last position. This token is added,
    # because servers answer up to the token before the last.
    ids, labels = batch.inputs["input_ids"].tolist(), batch.labels.tolist()
    documents = []
    for row, first, stop in _document_spans(batch):
        after = [token for token in labels[row][stop - 1 : stop] if token != IGNORE]
        text = (*ids[row][first:stop], *after)
        if len(text) > 1:
            documents.append(Document(row, first, text))
    return documents


def _document_spans(batch: Batch) -> Iterator[tuple[int, int, int]]:
    # Positions restart at 0 with every document.
    positions = batch.inputs["position_ids"].tolist()
    for row, there in enumerate(batch.valid.tolist()):
        here = [place for place, is_valid in enumerate(there) if is_valid]
        starts = [place for place in here if positions[row][place] == 0 or place == here[0]]
        for first, stop in pairwise([*starts, *(place + 1 for place in here[-1:])]):
            yield row, first, stop


def check_teacher_servers(inputs: RunInputs) -> None:
    """Check the servers of all teachers before any model loads; a collective."""
    for name, spec in inputs.config.teacher_specs.items():
        if spec.server is not None:
            on_main(partial(_check, inputs, name, spec.server))


def served_teacher(inputs: RunInputs, name: str, ranks: Ranks) -> ServedTeacher:
    """Return a teacher that its servers answer for; a collective."""
    server, wanted = inputs.config.teacher_specs[name].server, _wanted(inputs, name)
    if server is None:
        raise TypeError(f"{name} is not served")
    servers = replicas_of(server)
    return ServedTeacher(
        servers,
        model_names(servers, wanted),
        top_k=server.top_k,
        vocabulary=wanted.vocabulary,
        ranks=ranks,
    )


def _check(inputs: RunInputs, name: str, server: TeacherServerConfig) -> None:
    rows = inputs.encoded.train[:CHECKED_ROWS]["input_ids"]
    texts = [tuple(map(int, ids)) for ids in rows if len(ids) > 1]
    servers = replicas_of(server, patience_s=FIRST_PATIENCE_S)
    models = [model.name for model in served_models(servers, _wanted(inputs, name))]
    check_scores(servers, models, texts, server.top_k)


def check_scores(
    servers: Sequence[VllmServer],
    models: Sequence[str],
    texts: Sequence[tuple[int, ...]],
    top_k: int,
) -> None:
    """Compare the answers of all replicas to some texts, each asked `TIMES` times."""
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


def _wanted(inputs: RunInputs, name: str) -> Wanted:
    config = inputs.config
    return Wanted(
        name=config.teacher_specs[name].served_model or "",
        # The first token of the next row, and the token that vLLM generates after a text.
        longest=config.task.row_length + 2,
        vocabulary=min(inputs.sources[role].config.vocab_size for role in (name, STUDENT)),
        end_tokens=(),
    )
