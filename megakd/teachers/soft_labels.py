"""A teacher whose answers stand in the training rows (`task.soft_labels`)."""

from __future__ import annotations

from megakd.contract.batch import Batch, Knowledge
from megakd.contract.stage import Teacher

NEVER = -1e4
"""The logarithm of a probability of 0: finite, and 0 again at any temperature below 100."""


class SoftLabels(Teacher):
    """A teacher that answers with the probabilities that a batch brings along.

    The logits are log p, or of several labels log p/(1-p), so that a loss at temperature T softens
    a distribution to p^(1/T), normalised over the classes, or over yes and no.
    """

    def __call__(self, batch: Batch) -> Knowledge:
        """Return [B, C] logits."""
        soft = batch.extras.soft
        if soft is None:
            raise TypeError("only training rows have soft labels, and this batch has none")
        logits = soft.log().clamp(min=NEVER)
        if batch.multi_label:
            logits = logits - (-soft).log1p().clamp(min=NEVER)
        return Knowledge(logits=logits)

    def destroy(self) -> None:
        """Do nothing: there is no model."""
