"""Common parts of the methods with teacher assistants: options, views, losses, legs, trade-off."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from megakd.config.options import MethodOptions
from megakd.config.task import TEACHER
from megakd.config.terms import (
    ATTENTION_TERMS,
    STRICT,
    AttentionMse,
    Count,
    Heads,
    HiddenMse,
    RelationKl,
    Shape,
    TermConfig,
    Weight,
    layer_pairs,
)
from megakd.data.batch import Pass
from megakd.errors import ConfigError, TrainingError
from megakd.models.views import Allocation, View
from megakd.stage import Constant, Stage
from megakd.training.lab import Lab, Model

if TYPE_CHECKING:
    from megakd.training.allocation import SortedTeacher

DEPTHS = 6
"""Hidden states are compared at the layers 0, L/6, 2L/6, …, L."""


def _rising(sparsities: tuple[float, ...]) -> tuple[float, ...]:
    if any(second <= first for first, second in pairwise(sparsities)):
        raise ValueError(
            "the sparsities must be in increasing order without duplicates (got "
            f"{list(sparsities)})"
        )
    return sparsities


Sparsity = Annotated[float, Field(gt=0, lt=1)]
Grid = Annotated[tuple[Sparsity, ...], Field(min_length=1), AfterValidator(_rising)]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ImportanceOptions(MethodOptions):
    """Options of the methods that cut the student out of one teacher by the importance of units.

    The labels of the validation split determine the importance.
    """

    cuts_student: ClassVar[bool] = True

    @property
    def looks_into_teacher(self) -> bool:
        """True: the importance of units is measured inside the teacher."""
        return True

    def problems(self, config: Any) -> Iterator[str]:
        if config.teachers:
            yield (
                f'teachers: method "{self.name}" needs exactly one teacher; use the section '
                "teacher, or set method.name to a method for several teachers"
            )


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SparsityOptions(ImportanceOptions):
    """Options of the methods that cut the student to a sparsity.

    target_sparsity: share of the attention heads and of the neurons that the student lacks.
    allocation: `global` ranks the units of all layers together, by importance in units of the L2
        norm of their layer, as in the authors' code; `uniform` removes the same share of every
        layer.
    round_to: neurons and rows of heads are removed in multiples of this number.
    """

    target_sparsity: Sparsity = 0.9
    allocation: Allocation = "global"
    round_to: Count = 8

    @property
    def used_sparsities(self) -> tuple[float, ...]:
        """The sparsities that the method cuts at."""
        return (self.target_sparsity,)

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        if any(isinstance(term, AttentionMse) for term in config.objective or ()):
            yield (
                "objective: attention_mse compares attention head by head, and the student has "
                "fewer heads than its teacher; use relation_kl, which supports different numbers "
                "of heads"
            )


@dataclass(config=STRICT, frozen=True, kw_only=True)
class AssistantOptions(SparsityOptions):
    """Options of the methods with teacher assistants.

    sparsities: grid of the candidates' sparsities; must contain the target.
    tradeoff: lambda, the weight of sparsity in metric + lambda * sparsity, with `eval.metric`.
    """

    sparsities: Grid = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    tradeoff: Weight = 0.2

    @property
    def used_sparsities(self) -> tuple[float, ...]:
        """The sparsities of the grid that the method cuts at; some methods override this."""
        return self.sparsities

    def problems(self, config: object) -> Iterator[str]:
        yield from super().problems(config)
        target, grid = self.target_sparsity, ", ".join(f"{one:g}" for one in self.sparsities)
        unused = [f"{one:g}" for one in self.sparsities if one not in self.used_sparsities]
        if unused and self.sparsities != AssistantOptions.sparsities:  # not of the default grid
            yield (
                f"method.sparsities: method {self.name} trains nothing above method."
                f"target_sparsity {target:g}; remove {', '.join(unused)}"
            )
        if target not in self.sparsities:
            yield (
                f"method.target_sparsity: {target:g} is not among method.sparsities ({grid}); add "
                "the value to method.sparsities, or choose one of them"
            )
        elif target == self.sparsities[0] and getattr(self, "iterations", None) != 1:
            yield (
                f"method.sparsities: ({grid}) has no sparsity below method.target_sparsity "
                f"{target:g}, so that there is no assistant; add one, or set method.name to direct"
            )


def view_name(sparsity: float) -> str:
    """Return the name of a candidate in logs and results."""
    return f"sparsity-{sparsity:g}"


def views_of(
    config: SparsityOptions, lab: Lab, ranked: SortedTeacher, sparsities: Sequence[float]
) -> dict[str, View]:
    """Return the views of candidates by name, in the order of `sparsities`."""
    return {view_name(sparsity): view_of(config, lab, ranked, sparsity) for sparsity in sparsities}


def view_of(config: SparsityOptions, lab: Lab, ranked: SortedTeacher, sparsity: float) -> View:
    """Return the view of one candidate."""
    shape = Shape(lab.configured_model(TEACHER).depth, width=0, vocabulary=0)
    terms = [term for term in objective_of(lab) if isinstance(term, ATTENTION_TERMS)]
    pairs = [pair for term in terms for pair in layer_pairs(term, shape, shape)]
    return ranked.view_at(
        sparsity,
        allocation=config.allocation,
        round_to=config.round_to,
        # An attention, numbered from 0, whose vectors a loss compares must keep a head.
        with_heads=frozenset(layer - 1 for pair in pairs for layer in pair),
    )


def ranked_teacher(config: SparsityOptions, lab: Lab) -> tuple[str, SortedTeacher]:
    """Return the name of the teacher, and the sorted teacher, with which these methods begin."""
    check_reach(config, lab)
    teacher = lab.teacher()
    return teacher, lab.work.unit_scores(teacher)


def check_reach(config: SparsityOptions, lab: Lab) -> None:
    """Check, before any training, that all models can be cut that the method will cut."""
    if isinstance(config, AssistantOptions):  # which weigh a metric against sparsity
        lab.facts.metric()
    for term in objective_of(lab):
        if isinstance(term, RelationKl):
            _check_relations(term, lab.configured_model(TEACHER).heads)
    # The distribution of units over the layers, and so the effect of rounding, is not yet known.
    exact = dataclasses.replace(config, round_to=1) if config.allocation != "uniform" else config
    views_of(exact, lab, lab.facts.unscored(), config.used_sparsities)


def _check_relations(term: RelationKl, heads: Heads) -> None:
    """Check that the vectors of any number of heads can be cut into the same number of parts."""
    unit = heads.width
    if not {"key", "value"} & {*term.relations}:
        unit *= heads.queries // heads.keys  # shared keys are repeated for every query head
    if unit % (term.relation_heads or 1):
        fitting = ", ".join(str(n) for n in range(1, unit + 1) if unit % n == 0)
        raise ConfigError(
            f"objective: relation_kl.relation_heads {term.relation_heads} (null: the teacher's "
            f"attention heads) does not divide {unit}, the width that each head adds to a "
            f"candidate's vectors; use one of {fitting}"
        )


def objective_of(lab: Lab) -> tuple[TermConfig, ...]:
    """Return the objective of the config, or the objective of the paper, which uses no labels.

    Relations are cut into as many parts as the teacher has heads, also if an assistant teaches.
    The paper's objective is that of its code, hidden states at seven depths and soft targets, with
    half weight each.
    """
    teacher, given = lab.configured_model(TEACHER), lab.config.objective
    if given is not None:
        heads = teacher.heads.queries
        return tuple(
            dataclasses.replace(term, relation_heads=term.relation_heads or heads)
            if isinstance(term, RelationKl)
            else term
            for term in given
        )
    depths = dict.fromkeys(round(index * teacher.depth / DEPTHS) for index in range(DEPTHS + 1))
    mapping = tuple(f"{depth}:{depth}" for depth in depths)
    hidden = HiddenMse(loss="hidden_mse", weight=0.5, layer_mapping=mapping)
    # The cross-entropy with soft targets differs from their KL by a constant.
    return (hidden, *lab.soft_terms(0.5))


def leg(
    lab: Lab,
    name: str,
    *,
    teacher: str,
    start: Model,
    objective: tuple[TermConfig, ...] | None = None,
    meaning: str = "",
) -> Stage:
    """Return a stage with one teacher and one model of fixed size; None: `objective_of`."""
    return Stage(
        name=name,
        meaning=meaning,
        teachers=(teacher,),
        start=start,
        objective=objective or objective_of(lab),
        strategy=Constant((Pass(teacher=teacher),)),
    )


# Computed correlations may be slightly above 1 because of rounding.
_ABOVE_ONE = 1e-6


def tradeoff(metric: float, sparsity: float, weight: float) -> float:
    """Return the trade-off of a candidate: metric + lambda * sparsity.

    The metric is from 0 (a correlation from -1) to 1, higher is better.
    """
    return metric + weight * sparsity


def choose(scores: Mapping[float, float], *, weight: float, target: float) -> tuple[float, float]:
    """Return the sparsity with the highest trade-off, at most the target, and that trade-off.

    For equal trade-offs, the sparser candidate is chosen: it is smaller and as good, and in the
    limit of a large lambda, the sparsest candidate is chosen.

    Differs from the authors' code, which compares the metric of the target with the trade-offs of
    the other candidates, each from its best evaluation. Here, all values are trade-offs of the same
    evaluation.

    Args:
        scores: metric by sparsity.
        weight: the lambda of the trade-off.
        target: the sparsity at which the schedule ends.
    """
    for sparsity, metric in scores.items():
        if math.isnan(metric):
            raise TrainingError(
                f"the candidate of sparsity {sparsity:g} has no score (nan), so no candidate can "
                "be chosen; lower train.learning_rate if training has diverged"
            )
        if abs(metric) > 1 + _ABOVE_ONE:
            raise ConfigError(
                f"the candidate of sparsity {sparsity:g} scores {metric:g}: the trade-off needs a "
                "metric from 0 to 1 (a correlation from -1), where higher is better; perplexity "
                "and loss are not supported: set eval.metric, for example to accuracy"
            )
    highest, best = max((tradeoff(metric, s, weight), s) for s, metric in scores.items())
    return min(best, target), highest
