"""Positions of a batch that losses and strategies read."""

from __future__ import annotations

from torch import Tensor


def first_positions(states: Tensor, valid: Tensor) -> Tensor:
    """[B, D] of each row's first position that counts, which padding on the left moves."""
    place = valid.int().argmax(dim=1)
    return states.take_along_dim(place[:, None, None], dim=1).squeeze(1)
