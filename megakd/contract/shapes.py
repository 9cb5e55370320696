"""Shapes of models that losses depend on, and the pairs of layers that losses compare."""

from __future__ import annotations

from typing import NamedTuple


class Heads(NamedTuple):
    """Attention heads of a model's layers; keys and values may have fewer heads than queries."""

    queries: int
    keys: int
    width: int


class Shape(NamedTuple):
    """Shape of a model, as losses need it: layers, hidden width, vocabulary size, heads.

    vocabulary: rows of the output matrix.
    """

    layers: int
    width: int
    vocabulary: int
    heads: Heads | None = None
