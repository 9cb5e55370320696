"""Shrink a model to a budget: keep its most important layers, and repair the cut by distillation.

The layers to keep are those whose absence raises the held-out loss most (Shortened LLaMA, Kim et
al. 2024, arXiv 2402.02834): the fewest that have the size. They are whole if their number has the
size; otherwise each keeps about one share of its heads and neurons. The cut then learns from the
teacher in an ordinary stage; a decoder may learn on texts that it generates (GKD, Agarwal et al.
2024, arXiv 2306.13649).

All layers of a student have the same shape, so that the stock config of the family describes it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from megakd.config.task import LANGUAGE_TASKS, STUDENT, TEACHER
from megakd.config.terms import ATTENTION_TERMS, STRICT, Count, TermConfig
from megakd.errors import ConfigError
from megakd.methods.assistants import ImportanceOptions, leg
from megakd.models.views import View, evenly_spaced, most_important
from megakd.stage import Stage, StageResult
from megakd.training.lab import Lab, Model

logger = logging.getLogger(__name__)
BUDGETS = ("parameters", "flops", "speedup")
TOLERANCE, SPEED_TOLERANCE = 0.03, 0.05
"""How far a size and a time may be from the budget, as a share of it."""
MOST_MEASURED = 8
"""Shapes that are timed or counted at most until one has the size."""
LARGEST_GRID = 64
ERROR_WEIGHT = 10.0
"""A size that is 1 % off counts as much as shares of heads and neurons that differ by 0.1."""


def _number(examples: str, factors: Mapping[str, float | Decimal]) -> BeforeValidator:
    """Return what reads a text of a number with one of the units, by their factors."""

    def read(value: object) -> object:
        if isinstance(value, str):
            units = "".join(factors)
            match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*([{units}]?)\s*", value, re.IGNORECASE)
            if match is None:
                raise ValueError(f'must be a number {examples} (got "{value}")')
            value = float(Decimal(match[1]) * Decimal(factors.get(match[2].upper(), 1)))
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return BeforeValidator(read)


_WEIGHTS = "of weights such as 0.6B, 600M or 600000000"
_THOUSANDS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
Parameters = Annotated[int, _number(_WEIGHTS, _THOUSANDS), Field(ge=1)]
Share = Annotated[float, _number("such as 12% or 0.12", {"%": Decimal("0.01")}), Field(gt=0, lt=1)]
Speedup = Annotated[float, _number("such as 8x or 8", {"X": 1}), Field(gt=1)]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ShrinkConfig(ImportanceOptions):
    """Cut a model to a budget in depth and width, and repair it by distillation.

    Exactly one of the first three options is the budget.

    parameters: number of weights of the student, such as 0.6B, 600M or 600000000, as exported.
    flops: share of the multiplications in the teacher's layers that the student's layers need, such
        as 12%; attention scores, embeddings and output layer are not counted.
    speedup: how much faster than its teacher the student is on the device of the run, such as 8x,
        with 32 texts at a time, or one of a decoder; shapes with random weights are timed before
        anything is trained.
    round_to: multiple of the number of neurons; null: the largest divisor of 64 that divides the
        teacher's number.
    """

    learns_from_rollouts: ClassVar[bool] = True
    name: Literal["shrink"]
    parameters: Parameters | None = None
    flops: Share | None = None
    speedup: Speedup | None = None
    round_to: Count | None = None

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        sizes = {key: getattr(self, key) for key in BUDGETS}
        if sum(size is not None for size in sizes.values()) != 1:
            listed = ", ".join(f"{key} (got {size})" for key, size in sizes.items())
            yield f"method: set exactly one of {listed}"
        if any(isinstance(term, ATTENTION_TERMS) for term in config.objective or ()):
            yield (
                "objective: the student has fewer heads and layers than its teacher, so that "
                "attention cannot be compared; use soft targets or hidden_mse"
            )


def run(config: ShrinkConfig, lab: Lab) -> StageResult:
    """Choose the shape, cut it out of the teacher, and repair the cut."""
    shape = shape_of(config, lab, lab.configured_model(TEACHER))
    teacher = lab.teacher()
    start = lab.model(teacher)
    is_like = has_like_layers(start)
    if shape.experts:
        logger.info("shrink: experts are left out first, then layers")
    elif start.why_fixed is not None:
        logger.info("shrink: whole layers alone are left out: %s", start.why_fixed)
    elif not is_like or (shape.heads, shape.neurons) != (
        start.units.heads[0],
        start.units.neurons[0],
    ):
        # Only units that may be cut need to be sorted, and their importance to be measured.
        start = lab.work.unit_scores(teacher).source
    scores = lab.work.layer_scores(teacher)
    if config.speedup is None and not is_like:
        # The layers may differ in size: now those that stay are known.
        shape = shape_of(config, lab, start, scores)
    view = shape.view(start, lab.facts.layers(start, shape.layers, scores))
    what = next(key for key in BUDGETS if getattr(config, key) is not None)
    lab.record.asked = {"what": what, "value": getattr(config, what)}
    lab.record.layers = view.layers
    cut = lab.work.cut(start, view, "cut")
    return lab.train(leg(lab, STUDENT, teacher=teacher, start=cut, objective=objective_of(lab)))


def objective_of(lab: Lab) -> tuple[TermConfig, ...]:
    """Return the objective of the config, or the default.

    The default is the divergence from the teacher. A labelled row of a classifier or a regression
    also has the loss on its label; a classifier's weighs as much as the divergence of the row.
    """
    if lab.config.objective is not None:
        return lab.config.objective
    soft, is_language = lab.soft_terms(1.0), lab.config.task.type in LANGUAGE_TASKS
    return soft if is_language else (*soft, *lab.hard_terms(per_row=True))


def random_start(config: ShrinkConfig, lab: Lab, student: StageResult) -> Stage:
    """Return the stage of the baseline `random`: the student's shape from random weights."""
    del config
    start, teacher = lab.source(student.folder).fresh, lab.teacher()
    meaning = "the student's shape from random weights, taught by the same teacher"
    objective = objective_of(lab)
    return leg(lab, "random", teacher=teacher, start=start, objective=objective, meaning=meaning)


BASELINES = {"random": random_start}


class Shape(NamedTuple):
    """Numbers of layers, and of key-value groups with their queries and neurons of each layer.

    Heads are 0 if the model can lose none, and neurons if only whole layers can be left out.
    Experts are 0 if none of a layer is left out for its size.
    """

    layers: int
    heads: int
    neurons: int
    experts: int = 0

    def __str__(self) -> str:
        units = zip(self, ("layer", "key-value group", "neuron", "expert"), strict=True)
        return ", ".join(f"{count} {unit}{'s' * (count != 1)}" for count, unit in units if count)

    def view(self, model: Model, layers: Sequence[int]) -> View:
        """Return the shape as a view of a model with the layers that stay.

        A layer has no more units than in the model; what lies outside the layers stays.
        """
        depth, whole = model.depth, model.whole
        heads, neurons = (
            tuple(
                most if number > depth else min(count, most) * (number in layers)
                for number, most in enumerate(units, 1)
            )
            for count, units in ((self.heads, whole.heads), (self.neurons, whole.neurons))
        )
        experts = None if self.experts in (0, model.experts.total) else self.experts
        return View(heads, neurons, layers=(*layers,), experts=experts)


def has_like_layers(model: Model) -> bool:
    """Return whether all layers of a model have the same numbers of heads and neurons.

    Some layers of a mixture may have no experts.
    """
    units = model.whole
    return (
        bool(units.heads)
        and len(model.experts.blocks) in (0, model.depth)
        and all(len({*counts[: model.depth]}) == 1 for counts in (units.heads, units.neurons))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """All shapes that can be cut out of a model, and their sizes.

    A size is linear in the number of layers, and in the units of a layer.

    depth: layers of the model.
    heads, neurons: possible numbers of key-value groups and of neurons per layer, in rising order.
    experts: likewise of experts; more than one of a mixture whose experts go before its layers.
    sizes: sizes of the `corners`, from which all others follow.
    factors: by number of layers, a factor of the sizes.
    """

    depth: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    sizes: tuple[float, ...] = ()
    factors: Mapping[int, float] = dataclasses.field(default_factory=dict)
    experts: tuple[int, ...] = (0,)

    @property
    def corners(self) -> tuple[Shape, ...]:
        """The whole model, and with the fewest heads, neurons and experts, and with one layer."""
        whole = Shape(self.depth, self.heads[-1], self.neurons[-1], self.experts[-1])
        return (
            whole,
            whole._replace(heads=self.heads[0]),
            whole._replace(neurons=self.neurons[0]),
            whole._replace(experts=self.experts[0]),
            whole._replace(layers=1),
        )

    def size(self, shape: Shape) -> float:
        whole, fewest_heads, fewest_neurons, fewest_experts, one_layer = self.sizes
        layer = (whole - one_layer) / (self.depth - 1) if self.depth > 1 else whole
        # A time may rise with fewer units by chance.
        per_head = max(whole - fewest_heads, 0) / max(self.heads[-1] - self.heads[0], 1)
        per_neuron = max(whole - fewest_neurons, 0) / max(self.neurons[-1] - self.neurons[0], 1)
        lost = (self.heads[-1] - shape.heads) * per_head
        lost += (self.neurons[-1] - shape.neurons) * per_neuron
        per_expert = (whole - fewest_experts) / max(self.experts[-1] - self.experts[0], 1)
        lost += (self.experts[-1] - shape.experts) * per_expert
        outside = whole - self.depth * layer
        size = outside + shape.layers * (layer - lost / self.depth)
        return size * self.factors.get(shape.layers, 1.0)

    def around(self, target: float, layers: int) -> Iterator[Shape]:
        """Yield for each number of heads the shapes with the next size below and above a size."""
        # The neurons of a mixture stay.
        key = "neurons" if len(self.experts) == 1 else "experts"
        counts: tuple[int, ...] = getattr(self, key)
        for heads in self.heads:
            one = Shape(layers, heads, self.neurons[-1], self.experts[-1])

            def changed(count: int, one: Shape = one) -> Shape:
                return one._replace(**{key: count})

            above = bisect_right(counts, target, key=lambda n, to=changed: self.size(to(n)))
            yield from map(changed, counts[max(above - 1, 0) : above + 1])


class Budget(NamedTuple):
    """The size that a student should have.

    key: the option that asks for it.
    target: the size, in the unit of `Shapes.sizes`.
    tolerance: how far the size of a shape may be from the target, as a share of it.
    loose: likewise, if none is as near.
    text: function that writes a size.
    advice: end of the message that no shape has the size.
    """

    key: str
    target: float
    tolerance: float
    loose: float
    text: Callable[[float], str]
    advice: str = ""

    def error(self, size: float) -> float:
        return abs(size / self.target - 1)


def shape_of(
    config: ShrinkConfig, lab: Lab, model: Model, scores: Sequence[float] | None = None
) -> Shape:
    """Return the shape that has the budget of the config; see `fitting`.

    Args:
        scores: importance of the layers; None: it is not known yet.

    Raises:
        ConfigError: no shape has the size; the message has the nearest sizes.
    """
    shapes, whole = shapes_of(config, lab, model), model.whole._replace(width=None)
    budget = _budget(config)
    if scores is not None:  # a shape has the size, though perhaps not of the layers that matter
        budget = budget._replace(loose=math.inf)

    def view(one: Shape) -> View:
        return one.view(model, lab.facts.layers(model, one.layers, scores))

    def times(asked: Sequence[Shape], name: str) -> list[float]:
        views = {str(one): view(one) for one in asked if one != shapes.corners[0]}
        stage = re.sub(r"\W+", "-", f"times of {name}")
        measured = lab.work.times(model, views, stage)
        return [measured.get(str(one), 1.0) for one in asked]

    def size(one: Shape, layers: Sequence[int]) -> float:
        count = lab.facts.parameters(model, one.view(model, layers))
        if config.flops is None:
            return count.parameters
        return count.encoder_parameters / lab.facts.parameters(model, whole).encoder_parameters

    def estimate(one: Shape) -> float:  # that layers can do without the others is tried later
        stay = evenly_spaced(model.depth, one.layers)
        return size(one, stay if scores is None else most_important(scores, one.layers))

    if len(shapes.experts) > 1:
        least, total, chosen = shapes.experts[0], shapes.experts[-1], model.experts.chosen
        advice = f"; a layer keeps at least {least} of its {total} experts, because a token is "
        budget = budget._replace(advice=f"{advice}routed to {chosen}")
    elif config.parameters is not None and model.experts.why_kept is not None:
        budget = budget._replace(advice=f"; its experts stay: {model.experts.why_kept}")
    if config.speedup is not None:
        shapes = dataclasses.replace(shapes, sizes=tuple(times(shapes.corners, "extremes")))
        shape = measured_shape(shapes, budget, lambda one: times([one], str(one))[0])
    else:
        total, inside = lab.facts.parameters(model, whole)
        if config.flops is None and 2 * (total - inside) > budget.target:
            advice = f"{budget.advice}; {total - inside:,} weights are embeddings and what else "
            advice += (
                "lies outside the layers: launch/trim_vocabulary.py writes a teacher with fewer"
            )
            budget = budget._replace(advice=advice)
        shapes = dataclasses.replace(shapes, sizes=tuple(map(estimate, shapes.corners)))
        if not has_like_layers(model):
            depths = [shapes.corners[0]._replace(layers=n) for n in range(1, model.depth + 1)]
            factors = {one.layers: estimate(one) / shapes.size(one) for one in depths}
            shapes = dataclasses.replace(shapes, factors=factors)
        shape = measured_shape(
            shapes, budget, lambda one: size(one, lab.facts.layers(model, one.layers, scores))
        )
    lab.facts.check_layers(model, view(shape))
    return shape


def _budget(config: ShrinkConfig) -> Budget:
    if config.speedup is not None:
        return Budget(
            "method.speedup",
            1 / config.speedup,
            SPEED_TOLERANCE,
            2 * SPEED_TOLERANCE,
            lambda size: f"a speed-up of {1 / size:.2f}x",
            "; times beside other work are wrong: remove stages/times* of the run, and start again",
        )
    if config.flops is not None:
        text = "{:.1%} of the layers' operations".format
        return Budget("method.flops", config.flops, TOLERANCE, TOLERANCE, text)
    text = "{:,.0f} weights".format
    return Budget("method.parameters", config.parameters or 0, TOLERANCE, TOLERANCE, text)


def shapes_of(config: ShrinkConfig, lab: Lab, model: Model) -> Shapes:
    """Return the shapes that can be cut out of a model, without their sizes.

    Layers that have heads, or neurons, all keep the same number; where their numbers differ
    already, layers stay as they are. A mixture loses experts in place of heads for fewer weights:
    that a token is routed to as many of fewer experts saves no operations.
    """
    depth, experts = model.depth, model.experts
    if config.parameters is not None and experts.why_fixed is None:
        heads, neurons = (max(units, default=0) for units in model.whole[:2])
        every = experts.counts
        return Shapes(depth=depth, heads=(heads,), neurons=(neurons,), experts=every)
    if model.why_fixed is not None:
        return Shapes(depth=depth, heads=(0,), neurons=(0,))
    units = model.units.heads[:depth], model.units.neurons[:depth]
    heads, neurons = map(max, units)
    if any(len({*counts} - {0}) > 1 for counts in units):
        return Shapes(depth=depth, heads=(heads,), neurons=(neurons,))
    grid = config.round_to or math.gcd(LARGEST_GRID, neurons)
    if grid > neurons > 0:
        raise ConfigError(
            f"method.round_to: {grid} is larger than {neurons}, the number of neurons of the "
            "teacher's layers; lower method.round_to"
        )

    def is_stock(count: int) -> bool:
        view = Shape(depth, count, grid).view(model, range(1, depth + 1))
        return lab.facts.has_stock_config(model, view)

    # A model that no stock config describes keeps its heads, and brings the file of its class.
    stock = tuple(filter(is_stock, range(min(1, heads), heads + 1))) or (heads,)
    return Shapes(depth=depth, heads=stock, neurons=(*range(grid, neurons, grid), neurons))


def fitting(shapes: Shapes, budget: Budget) -> Shape | None:
    """Return the shape of a size with the fewest layers; None: no shape has the size.

    Layers are whole if a number of them is near the size. Else the share of the heads and the share
    of the neurons that each keeps are as equal as possible. If no size is within the tolerance, the
    nearest one counts, within what is `loose`. A mixture keeps the most layers, with fewer experts.
    """

    def error(one: Shape) -> float:
        return budget.error(shapes.size(one))

    def cost(one: Shape) -> float:
        uneven = one.heads / max(shapes.heads[-1], 1) - one.neurons / max(shapes.neurons[-1], 1)
        return abs(uneven) + ERROR_WEIGHT * error(one)

    depths = range(1, shapes.depth + 1)
    nearest = min((shapes.corners[0]._replace(layers=depth) for depth in depths), key=error)
    loses_experts = len(shapes.experts) > 1
    if error(nearest) <= TOLERANCE and not loses_experts:
        return nearest
    for depth in reversed(depths) if loses_experts else depths:
        every = [*shapes.around(budget.target, depth)]
        near = [one for one in every if error(one) <= budget.tolerance]
        if near:
            return min(near, key=cost)
        nearest = min([nearest, *every], key=error)
    return nearest if error(nearest) <= budget.loose else None


def measured_shape(shapes: Shapes, budget: Budget, measure: Callable[[Shape], float]) -> Shape:
    """Return a shape whose measured size is that of the budget.

    Sizes of shapes are estimates: times, and weights of layers that differ. Each measured size
    corrects those of as many layers, until a shape is near enough. If none seems to be, the nearest
    ones are measured.

    Raises:
        ConfigError: none is; the message has the nearest sizes.
    """
    target, whole, measured = budget.target, shapes.corners[0], dict[Shape, float]()
    if target >= shapes.size(whole):
        raise ConfigError(
            f"{budget.key}: the student would have {budget.text(target)}, and the teacher has "
            f"{budget.text(shapes.size(whole))}; give a smaller size"
        )
    while len(measured) < MOST_MEASURED:
        shape = fitting(shapes, budget)
        if shape is None:
            near = (one for one in neighbours(shapes, budget) if one not in measured)
            shape = next(near, None)
        if shape is None or shape in measured:
            break
        measured[shape] = measure(shape)
        if budget.error(measured[shape]) <= budget.tolerance:
            return shape
        factor = measured[shape] / shapes.size(shape) * shapes.factors.get(shape.layers, 1.0)
        shapes = dataclasses.replace(shapes, factors={**shapes.factors, shape.layers: factor})
    if measured:
        nearest = min(measured, key=lambda one: budget.error(measured[one]))
        if budget.error(measured[nearest]) <= budget.loose:
            return nearest
    raise ConfigError(no_shape(shapes, budget))


def neighbours(shapes: Shapes, budget: Budget) -> list[Shape]:
    """Return the shapes with the next size below and above that of the budget, if there are any."""
    every = (o for n in range(1, shapes.depth + 1) for o in shapes.around(budget.target, n))
    sizes = {one: shapes.size(one) for one in every}
    below = max((o for o in sizes if sizes[o] < budget.target), key=sizes.__getitem__, default=None)
    above = min((o for o in sizes if sizes[o] > budget.target), key=sizes.__getitem__, default=None)
    return [one for one in (below, above) if one is not None]


def no_shape(shapes: Shapes, budget: Budget) -> str:
    """Return the message that no shape has the size of the budget; it names the nearest ones."""
    near = [f"{budget.text(shapes.size(one))} ({one})" for one in neighbours(shapes, budget)]
    whole = shapes.corners[0]
    return (
        f"{budget.key}: no model with {budget.text(budget.target)} (within {budget.tolerance:.0%}) "
        f"can be cut out of the teacher ({whole}, {budget.text(shapes.size(whole))}); the nearest "
        f"possible sizes are {' and '.join(near)}{budget.advice}"
    )
