"""The teacher whose answers stand in the training rows."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset

from megakd.data.arrow import column_of
from megakd.data.batch import Batch, Outputs, Teacher
from megakd.data.soft_labels import SOFT

NEVER = -1e4
"""The logarithm of a probability of 0: finite, and 0 again at any temperature below 100."""


class SoftLabels(Teacher):
    """A teacher that answers with the probabilities of its training rows.

    The logits are log p, or of several labels log p/(1-p), so that a loss at temperature T softens
    a distribution to p^(1/T), normalised over the classes, or over yes and no.
    """

    def __init__(self, rows: Dataset, device: torch.device) -> None:
        self._rows, self._device = rows, device

    def __call__(self, batch: Batch) -> Outputs:
        """Return [B, C] logits; dummy rows have the probability 0 of every class."""
        if batch.rows is None:
            raise TypeError("only training rows have soft labels, and this batch has no numbers")
        numbers = batch.rows.cpu().numpy()
        shares = column_of(self._rows.select(numbers.clip(min=0)), SOFT)  # [B, C]
        shares = np.where(numbers[:, None] < 0, np.float32(0), shares)
        soft = torch.from_numpy(shares).to(self._device)
        logits = soft.log().clamp(min=NEVER)
        if batch.multi_label:
            logits = logits - (-soft).log1p().clamp(min=NEVER)
        return Outputs(logits=logits)

    def destroy(self) -> None:
        """Do nothing: there is no model."""
