"""Rows that name their teacher: the numbers of teachers, and a learner's outputs for such rows."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from megakd.contract.batch import Knowledge, Within

ROUTE = "route"
"""Column with the teacher of a row: its name in rows of text, its number in encoded rows."""


def teacher_number(name: str) -> int:
    """Return the number of a teacher in encoded rows: a hash of the name, from 1 to 2**48.

    The number does not depend on the other teachers, so that encoded rows can be used again with
    another list of teachers. Two of 1000 names have the same number with a probability of 2e-9.
    """
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def taken(outputs: Knowledge, within: Within) -> Knowledge:
    """Return a model's outputs for the part `within` a micro-batch, with gradient."""

    def states(values: Tensor) -> Tensor:  # [b, t, D]
        return values.flatten(0, 1)[within.positions]

    def hidden(values: Tensor) -> Tensor:  # [n, D] at the targets, or [b, t, D]
        return states(values) if within.targets is None else values[within.targets]

    return outputs.mapped(lambda logits: logits[within.rows], hidden, states)
