"""Teachers whose answers come from inference servers: most likely tokens, or hidden states.

They are checked before a run loads any model, and opened for its stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from megakd.config.rollout import TeacherServerConfig
from megakd.contract.batch import IGNORE, Batch, Knowledge, TopK
from megakd.contract.tasks import STUDENT
from megakd.engine import distributed
from megakd.engine.collectives import on_main, together
from megakd.engine.distributed import Ranks
from megakd.errors import ServerError
from megakd.inputs.inputs import RunInputs
from megakd.inputs.precision import TORCH_DTYPE, frozen_dtype
from megakd.models.next_tokens import Readout, load_readout
from megakd.models.source import ModelSource
from megakd.servers.connect import connections, model_names
from megakd.servers.hidden_states import ExportedStates, StatesServer, check_folder
from megakd.servers.http import FIRST_PATIENCE_S, PATIENCE_S, RunningCalls
from megakd.servers.protocol import (
    REFERENCE,
    BestTokens,
    TokenScorer,
    Wanted,
    check_reference,
    check_scores,
    served_models,
)
from megakd.servers.vllm import VllmServer
from megakd.storage.folders import check_given

Answer = TypeVar("Answer")
AT_ONCE = 64
"""Requests of a rank that run at the same time."""
COMPARED = 64
"""Tokens per position by which answers are compared."""
CHECKED_ROWS = 8
"""Training rows that the servers answer before the run."""


class Document(NamedTuple):
    """A document of a micro-batch that is a request, and the place of its first token."""

    row: int
    first: int
    ids: tuple[int, ...]


class ServedTeacher(ABC, Generic[Answer]):
    """A teacher whose servers answer micro-batches of a language model; a collective.

    Each document is a request of its own. The documents of a rank go to all replicas in turn.
    """

    def __init__(self, replicas: int, ranks: Ranks) -> None:
        self._replicas, self._ranks = replicas, ranks

    @abstractmethod
    def documents(self, batch: Batch) -> list[Document]:
        """Return the documents of a micro-batch that servers are asked about."""

    @abstractmethod
    def ask(self, replica: int, ids: tuple[int, ...]) -> Answer:
        """Return the answer of a replica to a document; called from several threads."""

    @abstractmethod
    def knowledge(self, batch: Batch, answers: Sequence[tuple[Document, Answer]]) -> Knowledge:
        """Return the outputs for a micro-batch from the answers to its documents."""

    def __call__(self, batch: Batch) -> Knowledge:
        return next(self.answers([batch]))

    def answers(self, batches: Sequence[Batch]) -> Iterator[Knowledge]:
        """Yield the outputs for every micro-batch of a step, which are asked for together."""
        texts = [self.documents(batch) for batch in batches]
        every = [document.ids for documents in texts for document in documents]
        calls = [
            partial(self.ask, (self._ranks.rank + number) % self._replicas, ids)
            for number, ids in enumerate(every)
        ]
        answers = iter(together(RunningCalls(calls, at_once=AT_ONCE).results))
        for batch, documents in zip(batches, texts, strict=True):
            yield self.knowledge(batch, [(document, next(answers)) for document in documents])

    def prefetch(self) -> None: ...  # the texts of the next step are not known

    def evict(self) -> None: ...

    def destroy(self) -> None: ...


class TopKTeacher(ServedTeacher["BestTokens"]):
    """A served teacher that answers with its most likely tokens at every position (`TopK`).

    All tokens are below `vocabulary`, which teacher and student share.
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
        documents = []
        for row, first, stop in _document_spans(batch):
            after = [token for token in labels[row][stop - 1 : stop] if token != IGNORE]
            text = (*ids[row][first:stop], *after)
            if len(text) > 1:
                documents.append(Document(row, first, text))
        return documents

    def ask(self, replica: int, ids: tuple[int, ...]) -> BestTokens:
        server = self._servers[replica]
        best = server.top_k(ids, self._top_k, self._models[replica])
        largest = best.ids.max()
        if largest >= self._vocabulary:
            raise ServerError(
                f"{server.url} knows token {largest}, and teacher and student share "
                f"{self._vocabulary} tokens; the servers serve another model, or top_k is too large"
            )
        return best

    def knowledge(self, batch: Batch, answers: Sequence[tuple[Document, BestTokens]]) -> Knowledge:
        size = (*batch.valid.shape, self._top_k)
        ids, logprobs = torch.full(size, -1, dtype=torch.int32), torch.zeros(size)  # [B, T, k]
        for (row, first, _), best in answers:
            here = slice(first, first + len(best.ids))
            ids[row, here], logprobs[row, here] = map(torch.from_numpy, best)
        device = self._ranks.device
        return Knowledge(kept=TopK(ids.to(device), logprobs.to(device)))


def _document_spans(batch: Batch) -> Iterator[tuple[int, int, int]]:
    # Positions restart at 0 with every document.
    positions = batch.inputs["position_ids"].tolist()
    for row, there in enumerate(batch.valid.tolist()):
        here = [place for place, is_valid in enumerate(there) if is_valid]
        starts = [place for place in here if positions[row][place] == 0 or place == here[0]]
        for first, stop in pairwise([*starts, *(place + 1 for place in here[-1:])]):
            yield row, first, stop


class StatesTeacher(ServedTeacher[ExportedStates]):
    """A served teacher that answers with (hidden, head), as the teacher's own engine does.

    The losses on these outputs are exact at every temperature, because they see the logits of all
    tokens.

    Args:
        readout: the final norm and the output matrix of the teacher, on the device of the rank.
    """

    def __init__(
        self,
        servers: Sequence[StatesServer],
        models: Sequence[str],
        *,
        readout: Readout,
        ranks: Ranks,
    ) -> None:
        super().__init__(len(servers), ranks)
        self._servers, self._models, self._readout = servers, models, readout

    def documents(self, batch: Batch) -> list[Document]:
        """Return the documents with a label; other positions count in no loss."""
        ids, labels = batch.inputs["input_ids"].tolist(), batch.labels.tolist()
        return [
            Document(row, first, tuple(ids[row][first:stop]))
            for row, first, stop in _document_spans(batch)
            if any(label != IGNORE for label in labels[row][first:stop])
        ]

    def ask(self, replica: int, ids: tuple[int, ...]) -> ExportedStates:
        return self._servers[replica].states(ids, self._models[replica])

    @torch.no_grad()
    def knowledge(
        self, batch: Batch, answers: Sequence[tuple[Document, ExportedStates]]
    ) -> Knowledge:
        """Return the head and its input [B, T, D] or [N, D], without meaning where no label is."""
        rows, length = batch.valid.shape
        weight = self._readout.weight
        # [B * T, D], in the dtype in which the teacher's own engine would have the states.
        states = torch.zeros(rows * length, weight.shape[1], dtype=weight.dtype)
        for (row, first, ids), exported in answers:
            start = row * length + first
            states[start : start + len(ids)] = exported.states
        if batch.targets is None:
            hidden = self._readout(states.view(rows, length, -1))
        else:
            hidden = self._readout(states[batch.targets.to(states.device)])
        return Knowledge(hidden=hidden, head=self._readout.head)


def teacher_replicas(
    server: TeacherServerConfig, source: ModelSource, *, patience_s: float = PATIENCE_S
) -> list[VllmServer]:
    """Return the replicas of `teacher.server` in the order of the config; nothing is asked yet.

    With `states` they are `StatesServer`s.
    """
    https = connections(server, patience_s)
    if server.states is None:
        return [VllmServer(http) for http in https]
    export = partial(
        StatesServer,
        folder=server.states,
        width=source.architecture.hidden_width(source.config),
        layers=source.architecture.number_of_layers(source.config),
        time_limit_s=server.time_limit,
    )
    return [export(http) for http in https]


def _readout(inputs: RunInputs, name: str, ranks: Ranks) -> Readout:
    spec, source = inputs.config.teacher_specs[name], inputs.sources[name]
    # In the dtype that the teacher's own engine would have.
    dtype = frozen_dtype(spec, source.stored_dtype, ranks.device.type)
    return load_readout(source, inputs.config.task, TORCH_DTYPE[dtype]).to(ranks.device)


def check_states(
    replicas: Sequence[StatesServer],
    models: Sequence[str],
    texts: Sequence[tuple[int, ...]],
    readout: Readout,
) -> list[BestTokens]:
    """Return the most likely tokens for some texts, after comparing all replicas.

    The first token that a server generates after a text must be a most likely token by its own
    hidden states: otherwise the states are those of another layer, or norm and head are those of
    another model.
    """
    scored = [StatesAsScores(server, readout) for server in replicas]
    answers = check_scores(scored, models, texts, min(COMPARED, readout.weight.shape[0]))
    for server in scored:
        gap = sum(server.gaps) / max(len(server.gaps), 1)
        if gap > REFERENCE:
            raise ServerError(
                f"teacher.server.states: the greedy tokens of {server.url} after {len(texts)} "
                f"texts are less likely than the best tokens by {gap:.3f} in the mean "
                "log-probability, computed from the exported hidden states with the norm and the "
                f"head of the teacher, and at most {REFERENCE} is expected; check that the server "
                "exports the output of the last layer (eagle_aux_hidden_state_layer_ids: "
                "[num_hidden_layers]) and serves the weights of teacher.model"
            )
    return answers


class StatesAsScores:
    """A server of hidden states as a `TokenScorer`, so that one check serves both.

    gaps: for every text, by how much the log-probability of the token that the server has
        generated is below that of the most likely token.
    """

    def __init__(self, server: StatesServer, readout: Readout) -> None:
        self._server, self._readout, self.url = server, readout, server.url
        self.gaps: list[float] = []

    def top_k(self, ids: tuple[int, ...], count: int, model: str) -> BestTokens:
        exported = self._server.states(ids, model)
        last = self._readout.logprobs(exported.states[-1:])[0]  # [V]
        if exported.following >= len(last):
            raise ServerError(
                f"{self.url} has generated token {exported.following}, and the teacher has "
                f"{len(last)} tokens; the server serves another model"
            )
        self.gaps.append(float(last.max() - last[exported.following]))
        values, tokens = self._readout.most_likely(exported.states[:-1], count)
        return BestTokens(tokens.int().cpu().numpy(), values.float().cpu().numpy())


def check_teacher_servers(inputs: RunInputs) -> None:
    """Check the servers of all teachers before any model loads; a collective."""
    for name, spec in inputs.config.teacher_specs.items():
        if spec.server is None:
            continue
        if spec.server.states is not None:
            wanted = "the shared_storage_path of the server, which every rank can read and write"
            together(partial(check_folder, spec.server.states, "teacher.server.states", wanted))
        on_main(partial(_check, inputs, name, spec.server))


def served_teacher(inputs: RunInputs, name: str, ranks: Ranks) -> ServedTeacher:
    """Return a teacher that its servers answer for; a collective."""
    server, wanted = inputs.config.teacher_specs[name].server, _wanted(inputs, name)
    if server is None:
        raise TypeError(f"{name} is not served")
    servers = teacher_replicas(server, inputs.sources[name])
    models = model_names(servers, wanted)
    if server.states is not None:
        readout = together(lambda: _readout(inputs, name, ranks))
        exporting = cast("list[StatesServer]", servers)
        return StatesTeacher(exporting, models, readout=readout, ranks=ranks)
    return TopKTeacher(
        servers,
        models,
        top_k=server.best_tokens,
        vocabulary=wanted.vocabulary,
        ranks=ranks,
    )


def _check(inputs: RunInputs, name: str, server: TeacherServerConfig) -> None:
    wanted = _wanted(inputs, name)
    rows = inputs.encoded.train[:CHECKED_ROWS]["input_ids"]
    texts = [tuple(map(int, ids)) for ids in rows if len(ids) > 1]
    servers = teacher_replicas(server, inputs.sources[name], patience_s=FIRST_PATIENCE_S)
    models = [model.name for model in served_models(servers, wanted)]
    if server.states is not None:
        readout = _readout(inputs, name, distributed.ranks())
        answers = check_states(cast("list[StatesServer]", servers), models, texts, readout)
    else:
        answers = check_scores(servers, models, texts, server.best_tokens)
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
