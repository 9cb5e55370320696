"""Sizes of the models that can be cut out of a decoder, and candidates of one size.

All layers of a candidate have the same shape, so that the stock config of the family describes it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from megakd.contract.views import View, most_important
from megakd.errors import ConfigError

TOLERANCE = 0.03
"""How far the size of a candidate may be from the wanted size."""
ERROR_WEIGHT = 10.0
"""A size that is 1 % off counts as much as shares of heads and neurons that differ by 0.1."""
LARGEST_GRID = 64
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parameters_of(value: object) -> object:
    """Return the whole number that a text such as "0.6B" or "600M" writes; others unchanged."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMBT]?)\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError(
            f'must be a number of weights such as 0.6B, 600M or 600000000 (got "{value}")'
        )
    return round(float(match[1]) * _FACTORS[match[2].upper()])


class Candidate(NamedTuple):
    """The shape of a model that can be cut out of the teacher, and its number of weights."""

    layers: int
    heads: int
    neurons: int
    parameters: int

    @property
    def name(self) -> str:
        """The name of the candidate's view; candidates of one size differ in their layers."""
        return f"layers-{self.layers}"

    def shape(self) -> str:
        return f"{self.layers} layers, {self.heads} key-value groups, {self.neurons} neurons"

    def view(self, layer_scores: Sequence[float]) -> View:
        """Return the candidate as a view of the teacher with its most important layers."""
        numbers = range(1, len(layer_scores) + 1)
        kept = most_important(layer_scores, self.layers)
        return View(
            heads=tuple(self.heads if number in kept else 0 for number in numbers),
            neurons=tuple(self.neurons if number in kept else 0 for number in numbers),
            layers=kept,
        )


class Cuts(NamedTuple):
    """All shapes that can be cut out of a decoder, and their numbers of weights.

    layers: layers of the decoder.
    heads, neurons: possible numbers of key-value groups and of neurons per layer, in rising order.
    outside: weights outside the layers. layer: weights of a layer without groups and neurons.
    head, neuron: weights of one key-value group with its queries, and of one neuron.
    """

    layers: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    outside: int
    layer: int
    head: int
    neuron: int

    def candidate(self, layers: int, heads: int, neurons: int) -> Candidate:
        each = self.layer + heads * self.head + neurons * self.neuron
        return Candidate(layers, heads, neurons, self.outside + layers * each)

    @property
    def whole(self) -> Candidate:
        return self.candidate(self.layers, self.heads[-1], self.neurons[-1])

    def nearest(self, target: int, layers: int, heads: int) -> Iterator[Candidate]:
        """Yield the shapes with the nearest sizes below and above a size, if there are any."""
        spare = (target - self.outside) / layers - self.layer - heads * self.head
        wanted = spare / self.neuron
        below = [count for count in self.neurons if count <= wanted]
        above = [count for count in self.neurons if count > wanted]
        for neurons in (*below[-1:], *above[:1]):
            yield self.candidate(layers, heads, neurons)

    def with_layers(self, target: int, layers: int) -> Candidate | None:
        """Return the shape with a number of layers that meets a size best; None: no shape does.

        The share of the key-value groups and the share of the neurons are as equal as possible.
        """
        found = [one for heads in self.heads for one in self.nearest(target, layers, heads)]
        fitting = [one for one in found if abs(one.parameters - target) <= TOLERANCE * target]
        return min(fitting, key=lambda one: self._cost(one, target), default=None)

    def _cost(self, one: Candidate, target: int) -> float:
        uneven = abs(one.heads / self.heads[-1] - one.neurons / self.neurons[-1])
        return uneven + ERROR_WEIGHT * abs(one.parameters / target - 1)


def cuts_of(
    whole: View,
    *,
    count: Callable[[View], int],
    is_stock: Callable[[View], bool],
    round_to: int | None,
) -> Cuts:
    """Return the shapes that can be cut out of a decoder.

    Args:
        round_to: multiple of the number of neurons; None: the largest divisor of 64 that divides
            the number of neurons of the decoder.
    """
    depth, heads, neurons = len(whole.heads), whole.heads[0], whole.neurons[0]
    if {*whole.heads} != {heads} or {*whole.neurons} != {neurons} or 0 in (heads, neurons):
        raise ConfigError(
            "method: shrink needs a teacher whose layers all have the same numbers of heads and "
            f"neurons (got {whole.heads} key-value groups and {whole.neurons} neurons); use a "
            "teacher that was not cut layer by layer"
        )
    grid = round_to or math.gcd(LARGEST_GRID, neurons)
    if grid > neurons:
        raise ConfigError(
            f"method.round_to: {grid} is larger than {neurons}, the number of neurons of the "
            "teacher's layers; lower method.round_to"
        )

    def weights(of_heads: int, of_neurons: int, layers: int = depth) -> int:
        numbers = tuple(range(1, layers + 1))
        return count(View((of_heads,) * depth, (of_neurons,) * depth, layers=numbers))

    empty = weights(0, 0)
    layer = (empty - weights(0, 0, 1)) // (depth - 1) if depth > 1 else 0
    return Cuts(
        layers=depth,
        heads=tuple(
            n for n in range(1, heads + 1) if is_stock(View((n,) * depth, (neurons,) * depth))
        ),
        neurons=(*range(grid, neurons, grid), neurons),
        outside=empty - depth * layer,
        layer=layer,
        head=(weights(1, 0) - empty) // depth,
        neuron=(weights(0, 1) - empty) // depth,
    )


def candidates_of(cuts: Cuts, target: int, wanted: int | Sequence[float]) -> list[Candidate]:
    """Return candidates of one size, from all layers with narrow ones to few layers as they are.

    Args:
        target: the wanted number of weights; a candidate is at most `TOLERANCE` off.
        wanted: number of candidates, which are spread evenly over the possible numbers of layers;
            or the share of the layers that each candidate keeps.
    """
    if target >= cuts.whole.parameters:
        raise ConfigError(
            f"method.parameters: the student would have {target:,} weights, and the teacher has "
            f"{cuts.whole.parameters:,}; give a smaller number"
        )
    depths = range(cuts.layers, 0, -1)
    fitting = [one for depth in depths if (one := cuts.with_layers(target, depth))]
    if not fitting:
        raise ConfigError(_no_such_size(cuts, target))
    if isinstance(wanted, int):
        return _spread(fitting, wanted)
    by_layers = {one.layers: one for one in fitting}
    asked = sorted({max(1, round(share * cuts.layers)) for share in wanted}, reverse=True)
    missing = [depth for depth in asked if depth not in by_layers]
    if missing:
        known = ", ".join(f"{depth / cuts.layers:.2g}" for depth in by_layers)
        raise ConfigError(
            f"method.candidates: no model of {target:,} weights has {missing[0]} of the teacher's "
            f"{cuts.layers} layers; use some of the shares {known}, or a number of candidates"
        )
    return [by_layers[depth] for depth in asked]


def _spread(fitting: Sequence[Candidate], count: int) -> list[Candidate]:
    if count >= len(fitting):
        return list(fitting)
    if count == 1:
        return [fitting[len(fitting) // 2]]
    last = len(fitting) - 1
    return [fitting[round(place * last / (count - 1))] for place in range(count)]


def _no_such_size(cuts: Cuts, target: int) -> str:
    found = [
        one
        for depth in range(1, cuts.layers + 1)
        for heads in cuts.heads
        for one in cuts.nearest(target, depth, heads)
    ]
    size = operator.attrgetter("parameters")
    below = max((one for one in found if one.parameters < target), key=size, default=None)
    above = min((one for one in found if one.parameters > target), key=size, default=None)
    near = [f"{one.parameters:,} ({one.shape()})" for one in (below, above) if one is not None]
    return (
        f"method.parameters: no model of {target:,} weights (within {TOLERANCE:.0%}) can be cut "
        f"out of the teacher ({cuts.whole.shape()}, {cuts.whole.parameters:,} weights); the "
        f"nearest possible sizes are {' and '.join(near)}"
    )
