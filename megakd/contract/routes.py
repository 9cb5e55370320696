"""Rows that name their teacher: the numbers of teachers, and a learner's outputs for such rows."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from megakd.contract.batch import AttentionVectors, Knowledge, Within

ROUTE = "route"
"""Column with the teacher of a row: its name in rows of text, its number in encoded rows."""


def teacher_number(name: str) -> int:
    """Return the number of a teacher in encoded rows: a hash of the name, from 1 to 2**48.

    The number does not depend on the other teachers, so that encoded rows can be used again with
    another list of teachers. Two of 1000 names have the same number with a probability of 2e-9.
    """
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def taken(said: Knowledge, within: Within) -> Knowledge:
    """Return a model's outputs for a part of a micro-batch, with gradient.

    Args:
        said: outputs for the whole micro-batch.
        within: the places of the part.
    """
    return said._replace(
        logits=None if said.logits is None else said.logits[within.rows],
        hidden=None if said.hidden is None else _hidden(said.hidden, within),
        hidden_states=tuple(None if s is None else _states(s, within) for s in said.hidden_states),
        attention=tuple(None if a is None else _vectors(a, within) for a in said.attention),
    )


def _hidden(hidden: Tensor, within: Within) -> Tensor:
    """Return [n, D] at the targets, or [b, t, D]."""
    return _states(hidden, within) if within.targets is None else hidden[within.targets]


def _states(values: Tensor, within: Within) -> Tensor:
    return values.flatten(0, 1)[within.positions]


def _vectors(vectors: AttentionVectors, within: Within) -> AttentionVectors:
    queries, keys, values = (_states(part, within) for part in vectors[:3])
    return vectors._replace(queries=queries, keys=keys, values=values)
