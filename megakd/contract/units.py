"""Units that can be removed from a model (attention heads, neurons, residual width), and views.

A unit of an attention is a key-value group, which is one head if every head has its own keys.
Once the units are sorted by importance, a sub-network is a prefix of every weight, and `View`
holds the lengths of the prefixes. The file does not import torch, so that configs and results can
hold views.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["heads", "neurons", "width"]


class View(NamedTuple):
    """A sub-network: the numbers of units that it keeps, which are the most important units.

    heads: key-value groups kept, one number per attention of the model.
    neurons: neurons kept, one number per feed-forward of the model.
    width: width of the hidden states; None keeps the full width.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    width: int | None = None

    def within(self, other: View) -> bool:
        """Return whether `other` contains this view."""
        pairs = [*zip(self.heads, other.heads, strict=True)]
        pairs += zip(self.neurons, other.neurons, strict=True)
        narrower = other.width is None or (self.width is not None and self.width <= other.width)
        return narrower and all(mine <= theirs for mine, theirs in pairs)


class UnitOrder(NamedTuple):
    """Units sorted by importance, the most important first, as indices into the stored model.

    heads: one list per attention. neurons: one list per feed-forward. width: None keeps the order.
    """

    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    width: tuple[int, ...] | None = None

    def of(self, kind: Kind, number: int) -> tuple[int, ...] | None:
        """Return the order of one attention, of one feed-forward, or of the width."""
        if kind == "width":
            return self.width
        return (self.heads if kind == "heads" else self.neurons)[number]


class Axis(NamedTuple):
    """Units along one dimension of a weight.

    kind, number: the owner of the units, such as the heads of attention 3 or the neurons of
        feed-forward 0; the width has only number 0.
    size: rows or columns per unit.
    parts: how often the list of units repeats (3 if queries, keys and values lie side by side).
    """

    kind: Kind
    number: int = 0
    size: int = 1
    parts: int = 1

    def kept(self, view: View) -> int | None:
        """Return the number of units that a view keeps of this dimension; None: all."""
        if self.kind == "width":
            return view.width
        return (view.heads if self.kind == "heads" else view.neurons)[self.number]

    def length(self, view: View) -> int | None:
        """Return the number of rows or columns that a view keeps; None: all."""
        kept = self.kept(view)
        return None if kept is None else kept * self.size * self.parts


Axes = tuple[Axis | None, ...]
"""One entry per dimension of a weight; None if the dimension cannot be cut."""
