"""Teachers whose most likely tokens come from inference servers.

They are checked before a run loads any model, and opened for its stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from megakd.config.rollout import TeacherServerConfig
from megakd.contract.batch import IGNORE, Batch, Knowledge, TopK
from megakd.contract.tasks import STUDENT
from megakd.engine.collectives import on_main, together
from megakd.engine.distributed import Ranks
from megakd.errors import ServerError
from megakd.inputs.inputs import RunInputs
from megakd.servers.connect import connections, model_names
from megakd.servers.http import FIRST_PATIENCE_S, PATIENCE_S, RunningCalls
from megakd.servers.protocol import (
    BestTokens,
    TokenScorer,
    Wanted,
    check_reference,
    check_scores,
    served_models,
)
from megakd.servers.vllm import VllmServer
from megakd.storage.folders import check_given

AT_ONCE = 64
"""Requests of a rank that run at the same time."""
CHECKED_ROWS = 8
"""Training rows that the servers answer before the run."""


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
        servers: Sequence[TokenScorer],
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


def _replicas_of(
    server: TeacherServerConfig, *, patience_s: float = PATIENCE_S
) -> list[VllmServer]:
    return [VllmServer(http) for http in connections(server, patience_s)]


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
    servers = _replicas_of(server)
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
    servers = _replicas_of(server, patience_s=FIRST_PATIENCE_S)
    models = [model.name for model in served_models(servers, _wanted(inputs, name))]
    answers = check_scores(servers, models, texts, server.top_k)
    if server.check_against is not None:
        reference = _Reference(server.check_against)
        check_reference(texts, answers, reference.logprobs, server.check_against)


def _wanted(inputs: RunInputs, name: str) -> Wanted:
    config = inputs.config
    return Wanted(
        name=config.teacher_specs[name].served_model or "",
        pushed=None,
        # The first token of the next row, and the token that vLLM generates after a text.
        longest=config.task.row_length + 2,
        vocabulary=min(inputs.sources[role].config.vocab_size for role in (name, STUDENT)),
        end_tokens=(),
    )


class _Reference:
    """A local copy of the served model on the CPU."""

    def __init__(self, folder: Path) -> None:
        check_given(folder, "teacher.server.check_against")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

    @torch.no_grad()
    def logprobs(self, text: tuple[int, ...], best: BestTokens) -> NDArray[np.float32]:
        logits = self._model(torch.tensor([text])).logits[0, :-1]  # [T - 1, V]
        tokens = torch.from_numpy(best.ids).long()  # [T - 1, k]
        return logits.float().log_softmax(-1).gather(-1, tokens).numpy()
