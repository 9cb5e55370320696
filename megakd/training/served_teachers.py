"""Teachers whose most likely tokens come from inference servers.

They are checked before a run loads any model, and opened for its stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from megakd.config.rollout import TeacherServerConfig
from megakd.contract.batch import IGNORE, Batch, Knowledge, TopK
from megakd.contract.tasks import STUDENT
from megakd.engine.collectives import on_main, together
from megakd.engine.distributed import Ranks
from megakd.errors import ServerError
from megakd.teachers.http import FIRST_PATIENCE_S, RunningCalls
from megakd.teachers.vllm import BestTokens, Requirements, VllmServer
from megakd.training.inputs import RunInputs
from megakd.training.served_texts import replicas_of

AT_ONCE = 64
"""Requests of a rank that run at the same time."""
CHECKED_ROWS = 8
"""Training rows that the servers answer before the run."""
REPEATED = 0.05
"""Largest mean difference of log-probabilities between answers of servers.

16-bit weights and other batches move log-probabilities of likely tokens by about 0.01; another
model, template or precision of 8 bits moves them by far more.
"""


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
        documents = [(batch, *place) for batch in batches for place in _documents(batch)]
        calls = [
            partial(self._ask, (self._ranks.rank + number) % len(self._servers), ids)
            for number, (_, _, _, ids) in enumerate(documents)
        ]
        answers = together(RunningCalls(calls, at_once=AT_ONCE).results)
        for batch in batches:
            size = (*batch.valid.shape, self._top_k)
            ids, logprobs = torch.full(size, -1, dtype=torch.int32), torch.zeros(size)  # [B, T, k]
            for (of, row, first, _), best in zip(documents, answers, strict=True):
                if of is batch:
                    here = slice(first, first + len(best.ids))
                    ids[row, here], logprobs[row, here] = map(torch.from_numpy, best)
            device = self._ranks.device
            yield Knowledge(kept=TopK(ids.to(device), logprobs.to(device)))

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

    def prefetch(self) -> None: ...  # the texts of the next step are not known

    def evict(self) -> None: ...

    def destroy(self) -> None: ...


def _documents(batch: Batch) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield row, first place and tokens of each document that has a prediction.

    A document that is cut by the end of its row predicts the first token of the next row, which is
    the label of its last position. This token is added, because servers answer up to the token
    before the last.
    """
    ids, labels = batch.inputs["input_ids"].tolist(), batch.labels.tolist()
    positions = batch.inputs["position_ids"].tolist()
    for row, valid in enumerate(batch.valid.tolist()):
        places = [place for place, is_valid in enumerate(valid) if is_valid]
        # Positions restart at 0 with every document.
        starts = [p for p in places if positions[row][p] == 0 or p == places[0]]
        for first, stop in pairwise([*starts, *(place + 1 for place in places[-1:])]):
            after = [token for token in labels[row][stop - 1 : stop] if token != IGNORE]
            text = (*ids[row][first:stop], *after)
            if len(text) > 1:
                yield row, first, text


def check_teacher_servers(inputs: RunInputs) -> None:
    """Check the servers of all teachers before any model loads; a collective."""

    def check(server: TeacherServerConfig, requirements: Requirements) -> None:
        rows = inputs.encoded.train[:CHECKED_ROWS]["input_ids"]
        texts = [tuple(map(int, ids)) for ids in rows if len(ids) > 1]
        servers = replicas_of(server, patience_s=FIRST_PATIENCE_S)
        check_scores(servers, texts, requirements, server.top_k)

    for name, spec in inputs.config.teacher_specs.items():
        if spec.server is not None:
            on_main(partial(check, spec.server, _requirements(inputs, name)))


def served_teacher(inputs: RunInputs, name: str, ranks: Ranks) -> ServedTeacher:
    """Return a teacher that its servers answer for; a collective."""
    server, requirements = inputs.config.teacher_specs[name].server, _requirements(inputs, name)
    if server is None:
        raise TypeError(f"{name} is not served")
    servers = replicas_of(server)
    return ServedTeacher(
        servers,
        on_main(lambda: [one.model(requirements).name for one in servers]),
        top_k=server.top_k,
        vocabulary=requirements.vocabulary,
        ranks=ranks,
    )


def check_scores(
    servers: Sequence[VllmServer],
    texts: Sequence[tuple[int, ...]],
    requirements: Requirements,
    top_k: int,
) -> None:
    """Check each replica's model, and compare the replicas' answers to some texts."""
    first: list[BestTokens] = []
    for server in servers:
        name = server.model(requirements).name
        answers = [server.top_k(text, top_k, name) for text in texts]
        first = first or answers
        gap = sum(map(difference, first, answers)) / max(len(texts), 1)
        if gap > REPEATED:
            raise ServerError(
                f"teacher.server: {servers[0].url} and {server.url} differ by {gap:.3f} in the "
                f"mean log-probability of the best tokens of {len(texts)} texts, and at most "
                f"{REPEATED} is expected; check that all replicas serve the same weights"
            )


def difference(one: BestTokens, other: BestTokens) -> float:
    """Return the mean absolute difference of log-probabilities over the best tokens of `one`.

    A token that `other` lacks has at most the smallest log-probability of `other`.
    """
    is_same = one.ids[:, :, None] == other.ids[:, None, :]  # [T, k, k]
    shared = np.where(is_same, other.logprobs[:, None, :], -np.inf).max(2)  # [T, k]
    least = other.logprobs.min(1, keepdims=True)
    return float(np.abs(one.logprobs - np.maximum(shared, least)).mean())


def _requirements(inputs: RunInputs, name: str) -> Requirements:
    config = inputs.config
    return Requirements(
        name=config.teacher_specs[name].served_model or "",
        # The first token of the next row, and the token that vLLM generates after a text.
        longest=config.task.row_length + 2,
        vocabulary=min(inputs.sources[role].config.vocab_size for role in (name, STUDENT)),
    )
