"""Shapes of models, the units that a model can lose (heads, neurons, residual width), and views.

A unit of an attention is a key-value group, which is one head if every head has its own keys.
Once the units are sorted by importance, a sub-network is a prefix of every weight, and `View`
holds the lengths of the prefixes. The file does not import torch, so that configs and results can
hold views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple


class ParameterCounts(NamedTuple):
    """Numbers of weights; `encoder_parameters` excludes embeddings, pooler, decoder and heads."""

    parameters: int
    encoder_parameters: int


Kind = Literal["heads", "neurons", "width", "experts"]

Columns = Literal["queries", "values"]
"""Columns inside each head: those of its queries and keys, or those of its values."""

Allocation = Literal["global", "uniform"]
"""How a sparsity is spread over the layers."""


class View(NamedTuple):
    """A sub-network: the numbers of units that it keeps, which are the most important units.

    heads: key-value groups kept, one number per attention of the model.
    neurons: neurons kept, one number per feed-forward of the model. Without numbers of heads and
        neurons, layers are whole; the units of the model need not be known.
    width: width of the hidden states; None keeps the full width.
    head_width: columns kept in every head, of its queries and keys and of its values; None keeps
        all columns.
    layers: numbers, from 1, of the layers that the model has once it is cut; None keeps all. The
        other layers have no heads and no neurons in this view, and hidden states pass them by.
    experts: experts kept in every layer that has some, once the model is cut; None keeps all.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    width: int | None = None
    head_width: int | None = None
    layers: tuple[int, ...] | None = None
    experts: int | None = None

    def within(self, other: View) -> bool:
        """Return whether `other` contains this view."""
        pairs = [*zip(self.heads, other.heads, strict=True)]
        pairs += zip(self.neurons, other.neurons, strict=True)
        narrower = other.width is None or (self.width is not None and self.width <= other.width)
        return narrower and all(mine <= theirs for mine, theirs in pairs)


def most_important(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """Return the numbers, from 1, of the layers with the highest scores; of equals, the first."""
    ranked = sorted(range(1, len(scores) + 1), key=lambda number: -scores[number - 1])
    return tuple(sorted(ranked[:count]))


def evenly_spaced(layers: int, count: int) -> tuple[int, ...]:
    """Return the numbers, from 1, of the first layer, the last, and evenly spaced ones between."""
    gap = (layers - 1) / max(1, count - 1)
    return tuple(1 + round(place * gap) for place in range(count))


class UnitOrder(NamedTuple):
    """Units sorted by importance, the most important first, as indices into the stored model.

    heads: one list per attention. neurons: one list per feed-forward. width: None keeps the order.
    queries, values: per attention, and per head of the stored model, the columns inside the head;
        None keeps the order.
    experts: one list per layer, those of a group beside each other; None keeps the order.
    """

    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    width: tuple[int, ...] | None = None
    queries: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    values: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    experts: tuple[tuple[int, ...], ...] | None = None

    def places(self, kind: Kind, number: int) -> tuple[int, ...] | None:
        """Return the order of the units of an owner; None: they stay in theirs."""
        if kind == "width":
            return self.width
        listed = {"heads": self.heads, "neurons": self.neurons, "experts": self.experts}[kind]
        return listed[number] if listed else None

    def inside(self, columns: Columns | None, number: int) -> tuple[tuple[int, ...], ...] | None:
        """Return the order of the columns inside each head of one attention; None: unchanged."""
        if columns is None:
            return None
        listed = self.queries if columns == "queries" else self.values
        return None if listed is None else listed[number]


class Cut(NamedTuple):
    """Instructions to cut a model: sort the units by `order`, then keep the units of `view`.

    order: None keeps the order of the stored model.
    view: None keeps all units.
    """

    order: UnitOrder | None
    view: View | None


class Axis(NamedTuple):
    """Units along one dimension of a weight.

    kind, number: the owner of the units, such as the heads of attention 3 or the neurons of
        feed-forward 0; the width has only number 0.
    size: rows or columns per unit.
    parts: how often the list of units repeats (3 if queries, keys and values lie side by side).
    columns: the columns inside each head, if they can be cut too.
    blocks: rows per unit in each part, where the parts differ; `size` is then their sum, and
        `parts` is 1.
    """

    kind: Kind
    number: int = 0
    size: int = 1
    parts: int = 1
    columns: Columns | None = None
    blocks: tuple[int, ...] = ()

    def kept(self, view: View | None) -> int | None:
        """Return the number of units that a view keeps of this dimension; None: all."""
        if view is None:
            return None
        if self.kind in ("width", "experts"):  # the same number for all owners
            return view.width if self.kind == "width" else view.experts
        listed = view.heads if self.kind == "heads" else view.neurons
        return listed[self.number] if listed else None

    def length(self, view: View | None) -> int | None:
        """Return the number of rows or columns that a view keeps; None: all."""
        kept = self.kept(view)
        return None if kept is None else kept * self.size_in(view) * self.parts

    def size_in(self, view: View | None) -> int:
        """Return the rows or columns that a view keeps of a unit."""
        width = None if view is None or self.columns is None else view.head_width
        return self.size if width is None else width

    def is_listed_in(self, order: UnitOrder | None) -> bool:
        """Return whether an order lists the units of this dimension or the columns inside them."""
        if order is None:
            return False
        moves = order.places(self.kind, self.number) is not None
        return moves or order.inside(self.columns, self.number) is not None

    def keeps_prefix(self, cut: Cut) -> bool:
        """Return whether the kept rows are the first rows of each part."""
        is_listed = self.is_listed_in(cut.order) or bool(self.blocks)
        return not is_listed and self.size_in(cut.view) == self.size

    def rows(self, cut: Cut, length: int) -> list[int]:
        """Return the rows or columns that a cut keeps, in the order of the cut model.

        `length`: rows or columns of the whole weight along this dimension.
        """
        part = length // self.parts
        order = None if cut.order is None else cut.order.places(self.kind, self.number)
        inside = None if cut.order is None else cut.order.inside(self.columns, self.number)
        count = part // self.size
        units = (order or range(count))[: self.kept(cut.view)]
        if self.blocks:
            starts = [count * sum(self.blocks[:place]) for place in range(len(self.blocks))]
            return [
                start + unit * size + row
                for start, size in zip(starts, self.blocks, strict=True)
                for unit in units
                for row in range(size)
            ]
        size, every = self.size_in(cut.view), tuple(range(self.size))
        rows = [
            unit * self.size + column
            for unit in units
            for column in (inside[unit] if inside else every)[:size]
        ]
        return [first + row for first in range(0, length, part or 1) for row in rows]


Axes = tuple[Axis | None, ...]
"""One entry per dimension of a weight; None if the dimension cannot be cut."""


class Maker(NamedTuple):
    """A matrix whose outputs are units.

    axis: the units. inputs: the units along the other dimension; None if it cannot be cut.
    dimension: the dimension of the matrix along which `axis` lies.
    shape: rows and columns of the whole matrix.
    """

    axis: Axis
    inputs: Axis | None
    dimension: int
    shape: tuple[int, int]
