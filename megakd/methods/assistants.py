"""What the schedules of teacher assistants have in common: options, views, losses, legs."""

from __future__ import annotations

import dataclasses
import logging
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from megakd.contract.methods import MethodOptions
from megakd.contract.tasks import FROM_TEACHER
from megakd.contract.terms import (
    ATTENTION_TERMS,
    STATE_TERMS,
    STRICT,
    AttentionMse,
    Count,
    HiddenMse,
    RelationKl,
    Weight,
)
from megakd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from megakd.contract.lab import Lab, Model, SortedModel
    from megakd.contract.shapes import Heads
    from megakd.contract.stage import Stage
    from megakd.contract.terms import TermConfig
    from megakd.contract.units import View

logger = logging.getLogger(__name__)
DEPTHS = 6
"""Hidden states are compared at 0, L/6, 2L/6, …, L."""
RELATION_HEADS = 32
"""Where hidden states of several widths cannot be compared, if it divides the width of a head."""


def _rising(sparsities: tuple[float, ...]) -> tuple[float, ...]:
    if any(second <= first for first, second in pairwise(sparsities)):
        raise ValueError(f"the grid must rise, each sparsity once; got {list(sparsities)}")
    return sparsities


Sparsity = Annotated[float, Field(gt=0, lt=1)]
Grid = Annotated[tuple[Sparsity, ...], Field(min_length=1), AfterValidator(_rising)]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class AssistantOptions(MethodOptions):
    """Options of all schedules of teacher assistants.

    target_sparsity: share of the attention heads and of the neurons that the student lacks; with
        `residual` of the weights between them and the hidden states.
    sparsities: the grid of candidates, the target among them.
    tradeoff: lambda, what leaving all units out is worth in units of the metric.
    metric: which of the task's metrics is weighed; null: the one that stands for the task.
    allocation: `global` ranks the units of all layers together, `uniform` takes as many of each.
    round_to: neurons and rows of heads are taken out in multiples of this many.
    importance_split: whose labels say what is important.
    importance_batch_size: rows of a batch of the importance pass, all ranks together; of a batch's
        gradient the absolute value is taken.
    residual: the hidden states become narrower too, and they, heads and neurons lose
        1 - sqrt(1 - sparsity) each.
    """

    cuts_student: ClassVar[bool] = True
    target_sparsity: Sparsity = 0.9
    sparsities: Grid = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    tradeoff: Weight = 0.2
    metric: str | None = None
    allocation: Literal["global", "uniform"] = "global"
    round_to: Count = 8
    importance_split: Literal["validation", "train"] = "validation"
    importance_batch_size: Count = 32
    residual: bool = False

    @property
    def looks_into_teacher(self) -> bool:
        """The importance of units is measured inside the teacher."""
        return True

    def problems(self, config: Any) -> Iterator[str]:
        """Yield what does not go with a student that is cut out of one teacher."""
        if config.teachers:
            yield (
                f'teachers: method "{self.name}" cuts one teacher; give it in a section '
                "teacher, or set method.name to a method for several teachers"
            )
        yield from self._problems_of_student(config.student)
        yield from self._problems_of_objective(config.objective or ())
        if self.target_sparsity not in self.sparsities:
            grid = ", ".join(f"{sparsity:g}" for sparsity in self.sparsities)
            yield (
                f"method.target_sparsity: {self.target_sparsity:g} is not among method.sparsities "
                f"({grid}); add it there, or choose one of them"
            )

    def _problems_of_student(self, student: Any) -> Iterator[str]:
        if student.layers is not None:
            yield (
                f'student.layers: method "{self.name}" takes heads and neurons out of all layers; '
                'remove the key, or set method.name to "single"'
            )
        if student.model != FROM_TEACHER:
            yield (
                f'student.model: method "{self.name}" cuts the student out of the teacher; '
                f'set student.model to "{FROM_TEACHER}"'
            )

    def _problems_of_objective(self, terms: Sequence[TermConfig]) -> Iterator[str]:
        if any(isinstance(term, AttentionMse) for term in terms):
            yield (
                "objective: attention_mse compares attention head by head, and the student has "
                "fewer heads than its teacher; relation_kl works with any number"
            )
        states = [term.loss for term in terms if isinstance(term, STATE_TERMS)]
        if self.residual and states:
            yield (
                f"objective: {', '.join(states)} compares hidden states of one width, and with "
                "method.residual every candidate's are narrower than its teacher's; relation_kl "
                "and soft targets work, or set method.residual to false"
            )


def view_name(sparsity: float) -> str:
    """A candidate's name in logs and results."""
    return f"sparsity-{sparsity:g}"


def views_of(
    config: AssistantOptions, lab: Lab, ranked: SortedModel, sparsities: Sequence[float]
) -> dict[str, View]:
    """Candidates by name, the widest first."""
    with_heads = _attentions_read(config, lab)
    return {
        view_name(sparsity): ranked.view_at(
            sparsity,
            allocation=config.allocation,
            round_to=config.round_to,
            residual=config.residual,
            with_heads=with_heads,
        )
        for sparsity in sparsities
    }


def view_of(config: AssistantOptions, lab: Lab, ranked: SortedModel, sparsity: float) -> View:
    """One candidate."""
    return views_of(config, lab, ranked, [sparsity])[view_name(sparsity)]


def _attentions_read(config: AssistantOptions, lab: Lab) -> frozenset[int]:
    """Attentions, from 0, whose vectors a loss compares: without heads there would be none."""
    from megakd.contract.shapes import Shape, layer_pairs

    shape = Shape(lab.teacher_layers, width=0, vocabulary=0)
    terms = [term for term in objective_of(config, lab) if isinstance(term, ATTENTION_TERMS)]
    pairs = [pair for term in terms for pair in layer_pairs(term, shape, shape)]
    return frozenset(layer - 1 for pair in pairs for layer in pair)


def size_at(config: AssistantOptions, lab: Lab, ranked: SortedModel, sparsity: float) -> int:
    """Weights of the encoder that are left at a sparsity; 0 is the whole of it."""
    view = view_of(config, lab, ranked, sparsity)
    return lab.parameters(ranked.source, view).encoder_parameters


def ranked_teacher(config: AssistantOptions, lab: Lab) -> tuple[str, SortedModel]:
    """The name of the teacher, and what its units are worth: what every schedule begins with.

    Raises:
        MegakdError: see `check_reach`; the teacher cannot be fine-tuned or measured.
    """
    check_reach(config, lab)
    teacher = lab.teacher()
    return teacher, ranked_units(config, lab, teacher)


def ranked_units(config: AssistantOptions, lab: Lab, teacher: str) -> SortedModel:
    """Return what a teacher's units are worth; measured once."""
    return lab.sorted_teacher(
        teacher,
        config.importance_split,
        batch_size=config.importance_batch_size,
        residual=config.residual,
    )


def check_reach(config: AssistantOptions, lab: Lab) -> None:
    """Refuses, before anything is trained, what could not be cut or weighed afterwards.

    Raises:
        MegakdError: heads, neurons or the width run out, the metric cannot be weighed, or
            relations cannot be compared between candidates.
    """
    lab.metric(config.metric)
    terms = objective_of(config, lab)
    for term in terms:
        if isinstance(term, RelationKl):
            _check_relations(term, lab.teacher_heads)
    if config.residual and lab.config.objective is None:
        (term,) = terms
        logger.info(
            "objective: relation_kl of the last layer, of queries, keys and values, with %s "
            "relation heads; it teaches no output head, which stays the teacher's, narrowed",
            getattr(term, "relation_heads", None),
        )
    # How units fall over the layers, and so what rounding does, is not known yet.
    exact = dataclasses.replace(config, round_to=1) if config.allocation == "global" else config
    views_of(exact, lab, lab.unscored(), config.sparsities)


def _check_relations(term: RelationKl, heads: Heads) -> None:
    """The vectors of however many heads are left must fall into the same number of parts.

    Raises:
        ConfigError: they do not.
    """
    unit = heads.width
    if not {"key", "value"} & {*term.relations}:
        unit *= heads.queries // heads.keys  # keys that queries share count as often as they do
    if unit % (term.relation_heads or 1):
        fitting = ", ".join(str(n) for n in range(1, unit + 1) if unit % n == 0)
        raise ConfigError(
            f"objective: relation_kl.relation_heads {term.relation_heads} (null: the teacher's "
            f"attention heads) does not divide {unit}, by which the candidates' vectors grow with "
            f"every head that they keep; numbers that do: {fitting}"
        )


def objective_of(config: AssistantOptions, lab: Lab) -> tuple[TermConfig, ...]:
    """The config's, else the paper's: no labels in any.

    Relations are cut into as many parts as the teacher has heads, not as an assistant has.
    """
    given = lab.config.objective
    if given is None:
        return (_last_relations(lab),) if config.residual else _states_and_targets(lab)
    heads = lab.teacher_heads.queries
    return tuple(
        dataclasses.replace(term, relation_heads=term.relation_heads or heads)
        if isinstance(term, RelationKl)
        else term
        for term in given
    )


def _last_relations(lab: Lab) -> RelationKl:
    """Of queries, keys and values of the last layer, a third each.

    The task-agnostic variant, as the code of MiniMoE by the same authors has it. Where 32 does
    not divide the width of a head, the teacher's heads are taken, or what divides both.
    """
    heads = lab.teacher_heads
    fits = heads.width % RELATION_HEADS == 0
    count = RELATION_HEADS if fits else math.gcd(heads.queries, heads.width)
    return RelationKl(loss="relation_kl", relation_heads=count)


def _states_and_targets(lab: Lab) -> tuple[TermConfig, ...]:
    """Half hidden states at seven depths and half soft targets.

    The task-specific variant, as the paper's code has it; the soft targets' cross-entropy
    differs from their KL by a constant.
    """
    layers = lab.teacher_layers
    depths = dict.fromkeys(round(index * layers / DEPTHS) for index in range(DEPTHS + 1))
    mapping = tuple(f"{depth}:{depth}" for depth in depths)
    hidden = HiddenMse(loss="hidden_mse", weight=0.5, layer_mapping=mapping)
    return (hidden, *lab.soft_terms(0.5))


def leg(config: AssistantOptions, lab: Lab, name: str, *, teacher: str, start: Model) -> Stage:
    """One teacher, one model of fixed size that was cut out of it."""
    from megakd.contract.stage import Constant, Pass, Stage

    return Stage(
        name=name,
        teachers=(teacher,),
        start=start,
        objective=objective_of(config, lab),
        strategy=Constant((Pass(teacher=teacher),)),
    )
