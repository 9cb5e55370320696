"""Positions of a batch that losses and strategies read."""

from __future__ import annotations

from torch import Tensor


def first_positions(states: Tensor, valid: Tensor) -> Tensor:
    """Return [B, D] states at each row's first valid position, which left padding shifts."""
    place = valid.int().argmax(dim=1)
    return states.take_along_dim(place[:, None, None], dim=1).squeeze(1)
