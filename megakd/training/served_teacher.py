"""The servers of a run's teachers: checked before the run, and as teachers."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoModelForCausalLM

from megakd.config.server_checks import teacher_model
from megakd.contract.tasks import STUDENT
from megakd.engine import distributed
from megakd.engine.collectives import on_main, together
from megakd.servers.agreement import Wanted, served_models
from megakd.servers.connect import scoring_replicas
from megakd.servers.scores import check_reference, check_scores
from megakd.servers.state_files import check_folder
from megakd.storage.finished_folder import check_given
from megakd.teachers.served import TopKTeacher
from megakd.training.exported_states import (
    check_states,
    exported_readout,
    states_replicas,
    states_teacher,
)

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray

    from megakd.config.models import TeacherConfig
    from megakd.config.run import RunConfig
    from megakd.engine.distributed import Ranks
    from megakd.servers.protocol import BestTokens
    from megakd.teachers.served import ServedTeacher
    from megakd.training.inputs import RunInputs

FIRST_PATIENCE_S = 0.5
"""Seconds in which a server must accept a connection before the run."""
_STATES = "the shared_storage_path of the server, which every rank can read and write"
CHECKED_ROWS = 8
"""Training rows that the servers answer before the run."""


def check_teacher_servers(config: RunConfig, inputs: RunInputs) -> None:
    """Check the servers of all teachers before any model loads; a collective.

    Raises:
        ServerError: a server is not there or serves another model, or the servers disagree with
            each other or with `server.check_against`; raised on every rank.
    """
    for name, spec in config.teacher_specs.items():
        if spec.server is None:
            continue
        folder = spec.server.states
        if folder is not None:
            together(lambda folder=folder: check_folder(folder, "teacher.server.states", _STATES))
        on_main(lambda name=name, spec=spec: _check(config, inputs, name, spec))


def served_teacher(config: RunConfig, inputs: RunInputs, name: str, ranks: Ranks) -> ServedTeacher:
    """Return a teacher that its servers answer for; a collective.

    Args:
        config: the config of the run.
        inputs: the inputs of the run.
        name: the name of a teacher with `server`.
        ranks: this process.

    Raises:
        ServerError: a server is not there or has changed; raised on every rank.
    """
    spec, wanted = config.teacher_specs[name], _wanted(config, inputs, name)
    server = spec.server
    if server is None:
        raise TypeError(f"{name} is not served")
    if server.states is not None:
        source = inputs.sources[name]
        exporting = states_replicas(server, server.states, source)
        return states_teacher(exporting, wanted, source, spec, config=config, ranks=ranks)
    servers = scoring_replicas(server)
    models = on_main(lambda: [model.name for model in served_models(servers, wanted)])
    return TopKTeacher(
        servers, models, top_k=server.best_tokens, vocabulary=wanted.vocabulary, ranks=ranks
    )


def _check(config: RunConfig, inputs: RunInputs, name: str, spec: TeacherConfig) -> None:
    server, wanted = spec.server, _wanted(config, inputs, name)
    if server is None:
        raise TypeError(f"{name} is not served")
    texts = _texts(inputs.encoded.train)
    if server.states is not None:
        source = inputs.sources[name]
        exporting = states_replicas(server, server.states, source, patience_s=FIRST_PATIENCE_S)
        models = served_models(exporting, wanted)
        readout = exported_readout(source, spec, config, distributed.ranks())
        answers = check_states(exporting, models, texts, readout)
    else:
        replicas = scoring_replicas(server, patience_s=FIRST_PATIENCE_S)
        models = served_models(replicas, wanted)
        names = [model.name for model in models]
        answers = check_scores(replicas, names, texts, server.best_tokens)
    if server.check_against is not None:
        own = _Reference(server.check_against)
        check_reference(texts, answers, own.logprobs, server.check_against)


def _wanted(config: RunConfig, inputs: RunInputs, name: str) -> Wanted:
    return Wanted(
        name=teacher_model(config.teacher_specs[name]) or "",
        pushed=None,
        # The first token of the next row, and the token that vLLM generates after a text.
        longest=config.task.row_length + 2,
        vocabulary=min(inputs.sources[role].config.vocab_size for role in (name, STUDENT)),
        end_tokens=(),
    )


def _texts(rows: Dataset) -> list[tuple[int, ...]]:
    first = rows.select(range(min(CHECKED_ROWS, len(rows))))["input_ids"]
    found = [tuple(int(token) for token in cast("list[int]", ids)) for ids in first]
    return [ids for ids in found if len(ids) > 1]


class _Reference:
    """A local copy of the served model on the CPU."""

    def __init__(self, folder: Path) -> None:
        check_given(folder, "teacher.server.check_against")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

    @torch.no_grad()
    def logprobs(self, text: tuple[int, ...], said: BestTokens) -> NDArray[np.float32]:
        """Return the log-probabilities of the tokens that servers have named."""
        logits = self._model(torch.tensor([text])).logits[0, :-1]  # [T - 1, V]
        tokens = torch.from_numpy(said.ids).long()  # [T - 1, k]
        return logits.float().log_softmax(-1).gather(-1, tokens).numpy()
