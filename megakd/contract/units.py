"""What can be taken out of a model: attention heads, neurons, residual width; and their views.

A unit of an attention is a key-value group, which is one head where every head has keys of its
own. Once units are sorted by importance a sub-network is a prefix of every weight, and `View`
says how long the prefixes are. Torch-free, so that configs and results can hold them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["heads", "neurons", "width"]


class View(NamedTuple):
    """A sub-network: how many units it keeps, the most important ones.

    heads: key-value groups kept, one number per attention of the model.
    neurons: one number per feed-forward of the model.
    width: of the hidden states; None keeps all of it.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    width: int | None = None

    def within(self, other: View) -> bool:
        """Whether `other` contains this view."""
        pairs = [*zip(self.heads, other.heads, strict=True)]
        pairs += zip(self.neurons, other.neurons, strict=True)
        narrower = other.width is None or (self.width is not None and self.width <= other.width)
        return narrower and all(mine <= theirs for mine, theirs in pairs)


class UnitOrder(NamedTuple):
    """Units by falling importance: numbers of the model as it is stored.

    heads: one list per attention. neurons: one per feed-forward. width: None keeps it as it is.
    """

    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    width: tuple[int, ...] | None = None

    def of(self, kind: Kind, number: int) -> tuple[int, ...] | None:
        """The order of one attention, feed-forward, or of the width."""
        if kind == "width":
            return self.width
        return (self.heads if kind == "heads" else self.neurons)[number]


class Axis(NamedTuple):
    """What one dimension of a weight is made of.

    kind, number: whose units: the heads of attention 3, the neurons of feed-forward 0; the width
        is there once, as number 0.
    size: how many rows or columns belong to a unit.
    parts: how often the list of units comes (3 where queries, keys and values lie side by side).
    """

    kind: Kind
    number: int = 0
    size: int = 1
    parts: int = 1

    def kept(self, view: View) -> int | None:
        """Units that a view keeps of this dimension; None: all."""
        if self.kind == "width":
            return view.width
        return (view.heads if self.kind == "heads" else view.neurons)[self.number]

    def length(self, view: View) -> int | None:
        """Rows or columns that a view keeps; None: all."""
        kept = self.kept(view)
        return None if kept is None else kept * self.size * self.parts


Axes = tuple[Axis | None, ...]
"""One per dimension of a weight; None where nothing can be taken out."""
