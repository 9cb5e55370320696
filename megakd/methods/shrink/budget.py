"""Budgets of a student: weights, operations of its layers, or time on this machine."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Annotated, NamedTuple, TypeVar

from pydantic import BeforeValidator, Field

from megakd.contract.lab import Lab, Model, TimedWork
from megakd.contract.views import View
from megakd.errors import ConfigError
from megakd.methods.shrink.candidates import (
    Budget,
    Candidate,
    Cuts,
    Family,
    candidates_of,
    corners_of,
    cuts_of,
    fewest_layers,
    fitting_of,
    nearest_of,
    no_candidate,
)

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SPEED_TOLERANCE = 0.05
"""How far the time of a candidate may be from the wanted time, as a share of it."""
TIMINGS = 4
"""How often a candidate is timed at most; in between, its number of neurons is corrected."""
SPARE = 3
"""Shapes that are timed where one is wanted: the fewest layers may turn out to be too fast."""
_size = operator.attrgetter("size")


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


def _with_sign(sign: str, divisor: int, example: str) -> Callable[[object], object]:
    def read(value: object) -> object:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({sign})?\s*", value, re.IGNORECASE)
        if match is None:
            raise ValueError(f'must be a number such as {example} (got "{value}")')
        return float(match[1]) / (divisor if match[2] else 1)

    return read


def _split(value: object) -> object:
    """Return the parts of a text with commas; one number alone is a list of one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if isinstance(value, list):
        return tuple(value)
    return value if value is None or isinstance(value, tuple) else (value,)


def falling(key: str, sizes: Sequence[float] | None, *, sign: int = 1) -> Iterator[str]:
    """Yield the problem of sizes that do not begin with the largest model."""
    if any(sign * first <= sign * second for first, second in pairwise(sizes or ())):
        listed = ", ".join(f"{size:,g}" for size in sizes or ())
        yield f"{key}: the largest model comes first, and sizes differ (got {listed})"


def short_name(parameters: int) -> str:
    """Return a number of weights as a user writes it, such as 600M."""
    factors = {letter: factor for letter, factor in _FACTORS.items() if factor <= parameters}
    letter = max(factors, key=factors.__getitem__)
    return f"{parameters / factors[letter]:.6g}{letter}"


T = TypeVar("T")
Several = Annotated[tuple[T, ...], BeforeValidator(_split), Field(min_length=1)]
Parameters = Annotated[int, BeforeValidator(parameters_of), Field(ge=1)]
Speedup = Annotated[float, BeforeValidator(_with_sign("x", 1, "8x or 8")), Field(gt=1)]
Share = Annotated[float, BeforeValidator(_with_sign("%", 100, "12% or 0.12")), Field(gt=0, lt=1)]


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
