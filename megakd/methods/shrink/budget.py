"""Budgets of a student: weights, operations of its layers, or time on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
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
    no_candidate,
)

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
TOLERANCE, SPEED_TOLERANCE = 0.03, 0.05
"""How far the size of a candidate may be from the wanted size, as a share of it."""
TIMINGS = 3
"""How often the candidates are timed; in between, their numbers of neurons are corrected."""


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

    def view(self, one: Candidate) -> View:
        return self.family.view(*one[:3], one.width)


def timed_candidates(
    sizes: Sizes, budget: Budget, wanted: int | Sequence[float], work: TimedWork
) -> list[Candidate]:
    """Return candidates whose measured time, relative to the teacher's, is that of the budget.

    The times of a few shapes give the times of all others. The candidates are then timed, and their
    numbers of neurons corrected.

    Raises:
        ConfigError: no shape is that fast; the message has the fastest that was timed.
    """

    def times(name: str, views: Mapping[str, View]) -> Mapping[str, float]:
        return sizes.lab.pruning.relative_times(sizes.model, views, name, work)

    # Many families have shapes that are the same, such as those of all heads and of the fewest.
    every = (view for width in sizes.widths for view in corners_of(sizes.family, width))
    whole, *others = dict.fromkeys(every)
    named = {f"shape-{number}": view for number, view in enumerate(others, start=1)}
    known = {named[name]: time for name, time in times("times", named).items()}
    cuts = sizes.of((known | {whole: 1.0}).__getitem__)
    # The sizes of shapes between the timed ones are estimates.
    timed = candidates_of(cuts, budget._replace(tolerance=2 * budget.tolerance), wanted)
    by_width = {of_width.width: of_width for of_width in cuts}
    names, fitting, misses = [one.name for one in timed], dict[str, Candidate](), timed
    for number in range(1, TIMINGS + 1):
        views = {one.name: sizes.view(one) for one in timed}
        measured = times(f"times-{budget.name}-{number}", views)
        timed = [one._replace(size=measured[one.name]) for one in timed]
        fitting |= {one.name: one for one in timed if budget.allows(one.size)}
        misses = [one for one in timed if one.name not in fitting]
        timed = [_corrected(by_width[one.width], one, budget.target) for one in misses]
        if not timed:
            break
    if not fitting:
        raise ConfigError(no_candidate(budget, misses, cuts[0].whole))
    return [fitting[name] for name in names if name in fitting]


def _corrected(cuts: Cuts, timed: Candidate, target: float) -> Candidate:
    """Return the shape of the same depth and heads whose time should be the target."""
    estimate = cuts.candidate(*timed[:3]).size
    near = cuts.nearest(target * estimate / timed.size, timed.layers, timed.heads)
    return min(near, key=lambda one: abs(one.size * timed.size / estimate - target))
