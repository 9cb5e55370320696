"""Losses of other packages, which are counted, weighted and reported like megakd's own."""

from __future__ import annotations

from torch import Tensor

from megakd.contract.batch import Knowledge, LossInputs
from megakd.contract.terms import PluginTerm
from megakd.errors import ConfigError
from megakd.losses.targets import Evaluated, TermGroup
from megakd.models.knowledge import Needs


class PluginLoss(TermGroup):
    """A term whose sum over the unit is computed by another package.

    The term may read the states of all `layers` of the student.
    """

    def __init__(self, term: PluginTerm, layers: int) -> None:
        super().__init__()
        self.term = term
        self.units = {term.loss: term.unit}
        self.needs = Needs()
        if term.reads_hidden_states:
            self.needs = self.needs.with_hidden(*range(layers + 1))

    def forward(self, reading: LossInputs) -> Evaluated:
        total = self.term.total(reading.student, reading.teacher, reading.batch)
        if not isinstance(total, Tensor) or total.dim() != 0:
            given = f"shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total)
            raise ConfigError(
                f"objective: {self.term.loss} returned {given}; total() must return the sum over "
                f"{self.term.unit} as a tensor without dimensions"
            )
        return self.of_one_term(reading, total.float())


def logits_of(knowledge: Knowledge) -> Tensor:
    """Return [N, C] fp32 logits: of a classifier's rows, or of a language model's targets.

    The logits of a language model are formed for this call, all N x vocabulary elements at once;
    megakd's own losses compute them in parts.
    """
    if knowledge.logits is not None:
        return knowledge.logits.float()
    if knowledge.hidden is None or knowledge.head is None:
        raise TypeError("the hidden states or the head, which form the logits, were not kept")
    weight, bias = knowledge.head.read()
    logits = (knowledge.hidden.to(weight.dtype) @ weight.T).float()  # [N, V]
    logits = logits if bias is None else logits + bias.float()
    return knowledge.head.warp(logits).flatten(0, -2)
