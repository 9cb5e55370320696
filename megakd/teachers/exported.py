"""A served teacher with exact outputs: servers export hidden states, the rank has norm and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megakd.contract.batch import IGNORE, Batch, Knowledge
from megakd.servers.hidden_states import ExportedStates
from megakd.teachers.served import Document, ServedTeacher, document_spans

if TYPE_CHECKING:
    from megakd.engine.distributed import Ranks
    from megakd.models.readout import Readout
    from megakd.servers.hidden_states import StatesServer


class StatesTeacher(ServedTeacher[ExportedStates]):
    """A served teacher that answers with (hidden, head), as the teacher's own engine does.

    The losses on these outputs are exact at every temperature, because they see the logits of all
    tokens.

    Args:
        servers: the replicas.
        models: the name of the model at each replica.
        readout: the final norm and the output matrix of the teacher, on the device of the rank.
        ranks: this process.
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
            for row, first, stop in document_spans(batch)
            if any(label != IGNORE for label in labels[row][first:stop])
        ]

    def ask(self, replica: int, ids: tuple[int, ...]) -> ExportedStates:
        """Return the hidden states of a text."""
        return self._servers[replica].states(ids, self._models[replica])

    @torch.no_grad()
    def knowledge(self, batch: Batch, said: Sequence[tuple[Document, ExportedStates]]) -> Knowledge:
        """Return the head and its input [B, T, D] or [N, D], without meaning where no label is."""
        rows, length = batch.valid.shape
        weight = self._readout.weight
        # [B * T, D], in the dtype in which the teacher's own engine would have the states.
        states = torch.zeros(rows * length, weight.shape[1], dtype=weight.dtype)
        for (row, first, ids), found in said:
            start = row * length + first
            states[start : start + len(ids)] = found.states
        if batch.targets is None:
            hidden = self._readout(states.view(rows, length, -1))
        else:
            hidden = self._readout(states[batch.targets.to(states.device)])
        return Knowledge(hidden=hidden, head=self._readout.head)
