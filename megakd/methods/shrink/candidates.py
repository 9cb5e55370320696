"""Shapes that can be cut out of a model, their sizes, and candidates of one size or one time.

All layers of a candidate have the same shape, so that the stock config of the family describes it.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from megakd.contract.lab import Lab, Model, TimedWork
from megakd.contract.views import View, most_important
from megakd.errors import ConfigError

ERROR_WEIGHT = 10.0
"""A size that is 1 % off counts as much as shares of heads and neurons that differ by 0.1."""
LARGEST_GRID = 64
SPEED_TOLERANCE = 0.05
"""How far the time of a candidate may be from the wanted time, as a share of it."""
TIMINGS = 4
"""How often a candidate is timed at most; in between, its number of neurons is corrected."""
SPARE = 3
"""Shapes that are timed where one is wanted: the fewest layers may turn out to be too fast."""
_size = operator.attrgetter("size")
TOLERANCE = 0.03
"""How far the size of a candidate may be from the wanted size, as a share of it."""


class Candidate(NamedTuple):
    """The shape of a model that can be cut out of the teacher, and its size.

    width: width of the hidden states; None: the teacher's.
    """

    layers: int
    heads: int
    neurons: int
    size: float
    width: int | None = None

    @property
    def name(self) -> str:
        """The name of the candidate's view; candidates of one size differ in layers or width."""
        return f"layers-{self.layers}" + (f"-width-{self.width}" if self.width else "")

    def shape(self) -> str:
        width = f", width {self.width}" if self.width else ""
        return f"{self.layers} layers, {self.heads} key-value groups, {self.neurons} neurons{width}"

    def view(self, layer_scores: Sequence[float], whole: View) -> View:
        """Return the candidate as a view of the teacher with its most important layers.

        Args:
            whole: the units of the teacher; what lies outside the layers stays.
        """
        depth = len(layer_scores)
        kept = most_important(layer_scores, self.layers)
        heads, neurons = (
            tuple(count if number in kept else 0 for number in range(1, depth + 1))
            for count in (self.heads, self.neurons)
        )
        return View(
            heads=heads + whole.heads[depth:],
            neurons=neurons + whole.neurons[depth:],
            width=self.width,
            layers=kept,
        )


class Cuts(NamedTuple):
    """All shapes of one width that can be cut out of a model, and their sizes.

    layers: layers of the model.
    heads, neurons: possible numbers of key-value groups and of neurons per layer, in rising order.
    outside: size outside the layers. layer: size of a layer without groups and neurons.
    head, neuron: size of one key-value group with its queries, and of one neuron.
    width: width of the hidden states; None: the teacher's.
    """

    layers: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    outside: float
    layer: float
    head: float
    neuron: float
    width: int | None = None

    def candidate(self, layers: int, heads: int, neurons: int) -> Candidate:
        each = self.layer + heads * self.head + neurons * self.neuron
        return Candidate(layers, heads, neurons, self.outside + layers * each, self.width)

    @property
    def whole(self) -> Candidate:
        return self.candidate(self.layers, self.heads[-1], self.neurons[-1])

    def nearest(self, target: float, layers: int, heads: int) -> Iterator[Candidate]:
        """Yield the shapes with the nearest sizes below and above a size, if there are any."""
        above = bisect_right(
            self.neurons, target, key=lambda count: self.candidate(layers, heads, count).size
        )
        for neurons in self.neurons[max(above - 1, 0) : above + 1]:
            yield self.candidate(layers, heads, neurons)

    def with_layers(self, target: float, layers: int, *, tolerance: float) -> Candidate | None:
        """Return the shape with a number of layers that meets a size best; None: no shape does.

        Whole layers are preferred; else the share of the key-value groups and the share of the
        neurons are as equal as possible.
        """
        whole = self.candidate(layers, self.heads[-1], self.neurons[-1])
        if abs(whole.size - target) <= TOLERANCE * target:
            return whole
        near = [one for heads in self.heads for one in self.nearest(target, layers, heads)]
        fitting = [one for one in near if abs(one.size - target) <= tolerance * target]

        def cost(one: Candidate) -> float:
            uneven = abs(one.heads / self.heads[-1] - one.neurons / self.neurons[-1])
            return uneven + ERROR_WEIGHT * abs(one.size / target - 1)

        return min(fitting, key=cost, default=None)


class Family(NamedTuple):
    """The model that shapes are cut out of: its units, its layers, and what its cuts can be.

    units: numbers of heads and neurons of the whole model.
    is_stock: whether the stock config of the family describes a view.
    round_to: multiple of the number of neurons; None: the largest divisor of 64 that divides the
        number of neurons of the model.
    """

    units: View
    depth: int
    is_stock: Callable[[View], bool]
    round_to: int | None

    def view(self, layers: int, heads: int, neurons: int, width: int | None = None) -> View:
        """Return a view of the first layers; which layers they are does not change a size."""
        numbers = tuple(float(-number) for number in range(self.depth))
        return Candidate(layers, heads, neurons, 0, width).view(numbers, self.units)

    @property
    def most(self) -> tuple[int, int]:
        """The numbers of key-value groups and neurons, which are the same in all layers."""
        heads, neurons = self.units.heads[: self.depth], self.units.neurons[: self.depth]
        if len({*heads}) != 1 or len({*neurons}) != 1 or 0 in (heads[0], neurons[0]):
            raise ConfigError(
                "method: shrink needs a teacher whose layers all have the same numbers of heads "
                f"and neurons (got {heads} key-value groups and {neurons} neurons); use a teacher "
                "that was not cut layer by layer"
            )
        return heads[0], neurons[0]

    def possible(self, width: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the numbers of key-value groups and of neurons that a layer can have."""
        heads, neurons = self.most
        grid = self.round_to or math.gcd(LARGEST_GRID, neurons)
        if grid > neurons:
            raise ConfigError(
                f"method.round_to: {grid} is larger than {neurons}, the number of neurons of the "
                "teacher's layers; lower method.round_to"
            )
        stock = tuple(
            n for n in range(1, heads + 1) if self.is_stock(self.view(self.depth, n, grid, width))
        )
        if not stock and width is None:
            raise ConfigError(
                "method: shrink needs a teacher that the stock config of its family describes, "
                f"and none has {heads} key-value groups of this width; use a teacher that was not "
                "cut before"
            )
        return stock, (*range(grid, neurons, grid), neurons)


def cuts_of(family: Family, size: Callable[[View], float], width: int | None = None) -> Cuts:
    """Return the shapes of one width; their sizes follow from the sizes of four of them.

    A size is linear in the number of layers, and in the units of a layer.
    """
    heads, neurons = family.possible(width)
    whole, fewer_heads, fewer_neurons, one_layer = map(size, corners_of(family, width))
    depth = family.depth
    # A time may rise with fewer units by chance.
    head = max(whole - fewer_heads, 0) / depth / max(heads[-1] - heads[0], 1)
    neuron = max(whole - fewer_neurons, 0) / depth / max(neurons[-1] - neurons[0], 1)
    layer = (whole - one_layer) / (depth - 1) if depth > 1 else whole
    inside = layer - heads[-1] * head - neurons[-1] * neuron
    return Cuts(depth, heads, neurons, whole - depth * layer, inside, head, neuron, width)


def corners_of(family: Family, width: int | None = None) -> tuple[View, View, View, View]:
    """Return the shapes whose sizes give those of all other shapes of a width.

    They are the whole, and that with the fewest heads, with the fewest neurons, and with one layer.
    """
    heads, neurons = family.possible(width)
    depth, most = family.depth, (heads[-1], neurons[-1])
    return (
        family.view(depth, *most, width),
        family.view(depth, heads[0], neurons[-1], width),
        family.view(depth, heads[-1], neurons[0], width),
        family.view(1, *most, width),
    )


class Budget(NamedTuple):
    """The size that a student should have.

    key: the option that asks for it.
    target: the size, in the unit of the cuts.
    tolerance: how far the size of a candidate may be from the target, as a share of it.
    text: writes a size.
    name: name of the size in files, such as 8x.
    advice: ends the message that no shape has the size.
    """

    key: str
    target: float
    tolerance: float
    text: Callable[[float], str]
    name: str = ""
    advice: str = ""

    def allows(self, size: float) -> bool:
        return abs(size / self.target - 1) <= self.tolerance


def candidates_of(
    cuts: Sequence[Cuts], budget: Budget, wanted: int | Sequence[float]
) -> list[Candidate]:
    """Return candidates of one size, from all layers with narrow ones to few layers as they are.

    Args:
        cuts: shapes of each width, the teacher's first.
        wanted: number of candidates, which are spread evenly over the possible numbers of layers
            of each width, and 1 is that of `fewest_layers`; or the share of the layers that each
            candidate keeps.
    """
    whole, target = cuts[0].whole, budget.target
    if target >= whole.size:
        raise ConfigError(
            f"{budget.key}: the student would have {budget.text(target)}, and the teacher has "
            f"{budget.text(whole.size)}; give a smaller size"
        )
    fitting = fitting_of(cuts, budget)
    if not fitting:
        raise ConfigError(no_candidate(budget, nearest_of(cuts, budget), whole))
    if not isinstance(wanted, int):
        return _with_shares(fitting, wanted, cuts[0])
    if wanted == 1:
        return [fewest_layers(fitting, target)]
    if wanted >= len(fitting):
        return fitting
    last = len(fitting) - 1
    return [fitting[round(place * last / (wanted - 1))] for place in range(wanted)]


def fitting_of(cuts: Sequence[Cuts], budget: Budget) -> list[Candidate]:
    """Return a shape of every width and number of layers that can have a size."""
    return [
        one
        for of_width in cuts
        for depth in range(of_width.layers, 0, -1)
        if (one := of_width.with_layers(budget.target, depth, tolerance=budget.tolerance))
    ]


def fewest_layers(fitting: Sequence[Candidate], target: float) -> Candidate:
    """Return the shape of the largest width with the fewest layers, whose units are the most.

    Of those with as many units, a whole layer more or less, it is the nearest to the target.
    """
    widest = [one for one in fitting if one.width == fitting[0].width]
    units = widest[-1][1:3]
    return min((o for o in widest if o[1:3] == units), key=lambda one: abs(one.size - target))


def _with_shares(
    fitting: Sequence[Candidate], shares: Sequence[float], cuts: Cuts
) -> list[Candidate]:
    by_layers = {one.layers: one for one in fitting if one.width is None}
    asked = sorted({max(1, round(share * cuts.layers)) for share in shares}, reverse=True)
    missing = [depth for depth in asked if depth not in by_layers]
    if missing:
        known = ", ".join(f"{depth / cuts.layers:.2g}" for depth in by_layers)
        raise ConfigError(
            f"method.candidates: no model of the wanted size has {missing[0]} of the teacher's "
            f"{cuts.layers} layers; use some of the shares {known}, or a number of candidates"
        )
    return [by_layers[depth] for depth in asked]


def nearest_of(cuts: Sequence[Cuts], budget: Budget) -> list[Candidate]:
    """Return the shapes around a size, of every width and number of layers."""
    return [
        one
        for of_width in cuts
        for depth in range(1, of_width.layers + 1)
        for heads in of_width.heads
        for one in of_width.nearest(budget.target, depth, heads)
    ]


def no_candidate(budget: Budget, near: Sequence[Candidate], whole: Candidate) -> str:
    """Return the message that no shape has the size of the budget; it names the nearest ones."""
    below = max((one for one in near if one.size < budget.target), key=_size, default=None)
    above = min((one for one in near if one.size > budget.target), key=_size, default=None)
    texts = [f"{budget.text(one.size)} ({one.shape()})" for one in (below, above) if one]
    return (
        f"{budget.key}: no model with {budget.text(budget.target)} (within {budget.tolerance:.0%}) "
        f"can be cut out of the teacher ({whole.shape()}, {budget.text(whole.size)}); the nearest "
        f"possible sizes are {' and '.join(texts)}{budget.advice}"
    )


class Sizes(NamedTuple):
    """Sizes of the shapes of a model.

    family: the model. widths: widths of the hidden states; None: the teacher's. lab: measures.
    model: the model that is cut, before or after it learns; a size depends on its config alone.
    """

    lab: Lab
    model: Model
    family: Family
    widths: Sequence[int | None]

    def weights(self, view: View) -> int:
        return self.lab.pruning.parameters(self.model, view).parameters

    def operations(self, view: View) -> float:
        """Return the multiplications of a token in the layers, as a share of the whole model's."""
        count = self.lab.pruning.parameters
        whole = count(self.model, self.family.units).encoder_parameters
        return count(self.model, view).encoder_parameters / whole

    def of(self, size: Callable[[View], float]) -> list[Cuts]:
        return [cuts_of(self.family, size, width) for width in self.widths]


def timed_candidates(
    sizes: Sizes, budget: Budget, wanted: int | Sequence[float], work: TimedWork
) -> list[Candidate]:
    """Return candidates whose measured time, relative to the teacher's, is that of the budget.

    The times of a few shapes give the times of all others. The candidates are then timed, and their
    numbers of neurons corrected. If none meets the tolerance, twice the tolerance counts. If one
    is wanted, it has the fewest layers, and a width is timed if no shape of the wider ones fits.

    Raises:
        ConfigError: no shape is that fast; the message has the nearest that were timed.
    """
    every, tried = list[Cuts](), list[Candidate]()
    loose = budget._replace(tolerance=2 * budget.tolerance)
    for widths in zip(sizes.widths) if wanted == 1 else (sizes.widths,):
        part = "" if widths[0] is None else f"-width-{widths[0]}"
        cuts = _timed_cuts(sizes, widths, f"times{part}", work)
        # The sizes of shapes between the timed ones are estimates.
        few = (
            fitting_of(cuts, loose)[-SPARE:] if wanted == 1 else candidates_of(cuts, loose, wanted)
        )
        timed = _timed(few, sizes, cuts, budget, f"times-{budget.name}{part}-", work)
        nearest = [min(ones, key=lambda o: abs(o.size - budget.target)) for ones in timed]
        fitting = [one for one in nearest if budget.allows(one.size)]
        fitting = fitting or [one for one in nearest if loose.allows(one.size)]
        if fitting:
            return [fewest_layers(fitting, budget.target)] if wanted == 1 else fitting
        every, tried = [*every, *cuts], [*tried, *chain(*timed)]
    near = tried or nearest_of(every, budget)
    raise ConfigError(no_candidate(budget, near, every[0].whole))


def _timed(
    untimed: Sequence[Candidate],
    sizes: Sizes,
    cuts: Sequence[Cuts],
    budget: Budget,
    name: str,
    work: TimedWork,
) -> list[list[Candidate]]:
    """Time candidates, correct those that miss the budget, and return all shapes of each."""
    by_width = {of_width.width: of_width for of_width in cuts}
    timed: dict[str, list[Candidate]] = {one.name: [] for one in untimed}
    for number in range(1, TIMINGS + 1):
        if not untimed:
            break
        views = {one.name: sizes.family.view(*one[:3], one.width) for one in untimed}
        measure = sizes.lab.pruning.relative_times
        measured = measure(sizes.model, views, f"{name}{number}", work)
        for one in untimed:
            timed[one.name].append(one._replace(size=measured[one.name]))
        misses = [ones for ones in timed.values() if not any(budget.allows(o.size) for o in ones)]
        following = (corrected(by_width[ones[0].width], ones, budget.target) for ones in misses)
        untimed = [one for one in following if one is not None]
    return [*timed.values()]


def _timed_cuts(
    sizes: Sizes, widths: Sequence[int | None], name: str, work: TimedWork
) -> list[Cuts]:
    whole, *_ = corners_of(sizes.family)
    # Many families have shapes that are the same, such as those of all heads and of the fewest.
    every = dict.fromkeys(view for width in widths for view in corners_of(sizes.family, width))
    others = [view for view in every if view != whole]
    named = {f"shape-{number}": view for number, view in enumerate(others, start=1)}
    times = sizes.lab.pruning.relative_times(sizes.model, named, name, work)
    known = {whole: 1.0} | {named[one]: time for one, time in times.items()}
    return [cuts_of(sizes.family, known.__getitem__, width) for width in widths]


def corrected(cuts: Cuts, timed: Sequence[Candidate], target: float) -> Candidate | None:
    """Return the shape of the same depth and heads whose time should be the target.

    Its time is on the line between a slower and a faster shape if both were timed, and else in
    proportion to the estimates. None: every such shape was timed.
    """
    layers, heads = timed[0].layers, timed[0].heads
    slower = min((o for o in timed if o.size > target), key=_size, default=None)
    faster = max((o for o in timed if o.size <= target), key=_size, default=None)

    def time(one: Candidate) -> float:
        if slower is None or faster is None:
            near = slower or faster or one
            return one.size * near.size / cuts.candidate(layers, heads, near.neurons).size
        share = (one.neurons - faster.neurons) / (slower.neurons - faster.neurons)
        return faster.size + share * (slower.size - faster.size)

    tried = {one.neurons for one in timed}
    rest = (cuts.candidate(layers, heads, n) for n in cuts.neurons if n not in tried)
    return min(rest, key=lambda one: abs(time(one) - target), default=None)
