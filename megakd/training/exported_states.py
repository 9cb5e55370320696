"""Teachers whose servers export hidden states: opened for a stage, and checked before the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.engine.collectives import on_main, together
from megakd.errors import ServerError
from megakd.models.readout import load_readout
from megakd.servers.agreement import served_models
from megakd.servers.hidden_states import Exports, StatesServer
from megakd.servers.http import PATIENCE_S, JsonServer
from megakd.servers.protocol import BestTokens
from megakd.servers.scores import REFERENCE, check_scores
from megakd.teachers.exported import StatesTeacher
from megakd.training.precision import TORCH_DTYPE, frozen_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from megakd.config.models import TeacherConfig
    from megakd.config.run import RunConfig
    from megakd.config.servers import TeacherServerConfig
    from megakd.engine.distributed import Ranks
    from megakd.models.readout import Readout
    from megakd.models.source import ModelSource
    from megakd.servers.agreement import Wanted
    from megakd.servers.protocol import ServedModel

COMPARED = 64
"""Tokens per position by which answers are compared."""


def states_replicas(
    server: TeacherServerConfig,
    folder: Path,
    source: ModelSource,
    *,
    patience_s: float = PATIENCE_S,
) -> list[StatesServer]:
    """Return the replicas of `teacher.server` in the order of the config; nothing is asked yet.

    Args:
        server: the key `teacher.server`.
        folder: the key `teacher.server.states`.
        source: the model of the teacher.
        patience_s: see `JsonServer`.
    """
    exports = Exports(
        folder,
        width=source.architecture.hidden_width(source.config),
        layers=source.architecture.number_of_layers(source.config),
        time_limit_s=server.time_limit,
    )
    return [
        StatesServer(
            JsonServer(url, time_limit_s=server.time_limit, patience_s=patience_s), exports
        )
        for url in server.url
    ]


def states_teacher(
    replicas: Sequence[StatesServer],
    wanted: Wanted,
    source: ModelSource,
    spec: TeacherConfig,
    *,
    config: RunConfig,
    ranks: Ranks,
) -> StatesTeacher:
    """Return a teacher whose servers export hidden states; a collective.

    Raises:
        MegakdError: a server is not there or has changed, or norm or head cannot be read; raised
            on every rank.
    """
    models = on_main(lambda: [model.name for model in served_models(replicas, wanted)])
    readout = together(lambda: exported_readout(source, spec, config, ranks))
    return StatesTeacher(replicas, models, readout=readout, ranks=ranks)


def exported_readout(
    source: ModelSource, spec: TeacherConfig, config: RunConfig, ranks: Ranks
) -> Readout:
    """Return the end of the teacher, in the dtype that the teacher's own engine would have.

    Raises:
        ModelError: norm or head cannot be read.
    """
    dtype = frozen_dtype(spec, source.stored_dtype, ranks.device.type)
    return load_readout(source, config.task, TORCH_DTYPE[dtype]).to(ranks.device)


def check_states(
    replicas: Sequence[StatesServer],
    models: Sequence[ServedModel],
    texts: Sequence[tuple[int, ...]],
    readout: Readout,
) -> list[BestTokens]:
    """Return the most likely tokens for some texts, after comparing all replicas.

    The first token that a server generates after a text must be a most likely token by its own
    hidden states: otherwise the states are those of another layer, or norm and head are those of
    another model.

    Raises:
        ServerError: two answers of servers differ, a token of a server is unlikely, or an answer
            cannot be used.
    """
    scored = [StatesAsScores(server, readout) for server in replicas]
    count = min(COMPARED, readout.weight.shape[0])
    names = [model.name for model in models]
    answers = check_scores(scored, names, texts, count)
    for server in scored:
        found = sum(server.gaps) / max(len(server.gaps), 1)
        if found > REFERENCE:
            raise ServerError(
                f"teacher.server.states: the greedy tokens of {server.url} after {len(texts)} "
                f"texts are less likely than the best tokens by {found:.3f} in the mean "
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
        self._server, self._readout = server, readout
        self.gaps: list[float] = []

    @property
    def url(self) -> str:
        """The address of the server."""
        return self._server.url

    def top_k(self, ids: tuple[int, ...], count: int, model: str) -> BestTokens:
        """Return the most likely next tokens after each token of a text but the last."""
        said = self._server.states(ids, model)
        last = self._readout.logprobs(said.states[-1:])[0]  # [V]
        if said.following >= len(last):
            raise ServerError(
                f"{self.url} has generated token {said.following}, and the teacher has "
                f"{len(last)} tokens; the server serves another model"
            )
        self.gaps.append(float(last.max() - last[said.following]))
        values, tokens = self._readout.most_likely(said.states[:-1], count)
        return BestTokens(tokens.int().cpu().numpy(), values.float().cpu().numpy())
