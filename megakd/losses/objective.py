"""The weighted list of loss terms of a stage, checked against both models before they load."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from megakd.contract.batch import Knowledge, LossInputs, Unit
from megakd.contract.layer_mapping import check_heads, layer_pairs, relation_heads
from megakd.contract.tasks import LANGUAGE_TASKS, TaskType
from megakd.contract.terms import (
    ATTENTION_TERMS,
    INTERMEDIATE_TERMS,
    SOFT_TARGET_DIVERGENCES,
    AttentionMse,
    HardCrossEntropy,
    HardMse,
    MethodTerm,
    PluginTerm,
    RelationFsp,
    RelationKl,
    SoftTargetMse,
    TermConfig,
    compares,
    reads_states,
    term_name,
)
from megakd.contract.unit_counts import COUNTERS, UnitCounter
from megakd.contract.views import Shape
from megakd.errors import ConfigError, TeacherError
from megakd.losses.layer_terms import (
    AttentionMatrices,
    FspMatrices,
    HiddenStates,
    Projections,
    Relations,
)
from megakd.losses.plugin_losses import PluginLoss
from megakd.losses.targets import (
    AGREEMENTS,
    Evaluated,
    RegressionScores,
    TermGroup,
    class_groups,
    language_model_groups,
)
from megakd.models.knowledge import Needs

WEIGHTED_LOSS = "loss"
"""Key of the minimised loss in a report: all passes with their scales and weights."""


class Objective(nn.Module):
    """The loss terms of a stage, and their learned projections.

    The objective runs inside the forward of the student's engine, so that losses read correct
    weights at every ZeRO stage.
    """

    def __init__(self, groups: Sequence[TermGroup], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        self.weights = dict(weights)
        self.units: dict[str, Unit] = {n: u for g in groups for n, u in g.units.items()}
        self.counters: dict[Unit, UnitCounter] = dict(COUNTERS)
        self.needs = Needs()
        for group in groups:
            self.counters |= group.counters
            self.needs = self.needs.with_hidden(*group.needs.hidden_layers)
            self.needs = self.needs.with_attention(*group.needs.attention_layers)

    def forward(self, readings: Sequence[LossInputs]) -> list[Evaluated]:
        """Return for each reading the weighted and scaled total with gradient, and detached sums.

        The readings are of one batch, by views of one width. A group may put the total of several
        readings into one of them, so only the sum of all totals has a meaning.
        """
        left_out = frozenset.intersection(*(reading.left_out for reading in readings))
        groups = cast("list[TermGroup]", list(self.groups))
        wanted = [g for g in groups if not left_out.issuperset(g.units.keys() - AGREEMENTS)]
        if not wanted:
            return [Evaluated(_zero(reading.student), {}) for reading in readings]
        readings = [replace(reading, left_out=left_out) for reading in readings]
        of_groups = [group.of_all(readings) for group in wanted]
        return [
            Evaluated(
                functools.reduce(operator.add, [part.total.float() for part in parts]),
                {name: value for part in parts for name, value in part.sums.items()},
            )
            for parts in zip(*of_groups, strict=True)
        ]

    def bind(self, learners: Mapping[str, nn.Module]) -> None:
        """Show the models of the stage, by role, to the groups that read weights."""
        for group in cast("list[TermGroup]", list(self.groups)):
            group.bind(learners)

    def projections(self) -> list[nn.Linear]:
        """Return the learned maps from the student's hidden states to the teacher's."""
        learned = (module for module in self.modules() if isinstance(module, Projections))
        return [cast("nn.Linear", linear) for module in learned for linear in module]


def _zero(answer: Knowledge) -> Tensor:
    """Return 0 with a gradient of 0 for every weight that a model's outputs were computed with.

    A constant would have no backward, with which ZeRO reduces gradients and frees gathered weights.
    """
    outputs = answer.hidden if answer.logits is None else answer.logits
    if outputs is None:
        raise TypeError("a model without logits and without hidden states has no loss")
    # Padding may hold NaN, and NaN times 0 is NaN.
    return outputs.float().nan_to_num(0.0, 0.0, 0.0).mul(0.0).sum()


def build_objective(
    terms: Sequence[TermConfig], task: TaskType, student: Shape, teacher: Shape | None
) -> Objective:
    """Build the objective of a stage from its terms; without a teacher, for supervised training."""
    check_terms(terms, student, teacher)
    soft = tuple(t for t in terms if isinstance(t, SOFT_TARGET_DIVERGENCES))
    hard = tuple(t for t in terms if isinstance(t, HardCrossEntropy))
    groups: list[TermGroup] = []
    if task in LANGUAGE_TASKS:
        groups.extend(language_model_groups(soft, hard))
    else:
        groups.extend(class_groups(soft, next(iter(hard), None)))
    groups.extend(PluginLoss(t, student.layers) for t in terms if isinstance(t, PluginTerm))
    groups.extend(RegressionScores(t) for t in terms if isinstance(t, HardMse | SoftTargetMse))
    groups.extend(t.group() for t in terms if isinstance(t, MethodTerm))
    if teacher is not None:
        groups.extend(_intermediate_groups(terms, task, student, teacher))
    return Objective(groups, {term_name(t): t.weight for t in terms})


def _intermediate_groups(
    terms: Sequence[TermConfig], task: TaskType, student: Shape, teacher: Shape
) -> Iterator[TermGroup]:
    causal = task == "causal_lm"
    for term in terms:
        if not isinstance(term, INTERMEDIATE_TERMS):
            continue
        pairs = layer_pairs(term, student, teacher)
        if isinstance(term, RelationKl):
            heads = relation_heads(term, student, teacher)
            yield Relations(term, pairs, heads=heads, causal=causal)
        elif isinstance(term, AttentionMse):
            yield AttentionMatrices(term, pairs, causal=causal)
        elif isinstance(term, RelationFsp):
            yield FspMatrices(term, pairs, (student.width, teacher.width))
        else:
            yield HiddenStates(term, pairs, (student.width, teacher.width))


def teacher_needs(terms: Sequence[TermConfig], student: Shape, teacher: Shape) -> Needs:
    """Return the outputs that the terms need from the teacher's forward."""
    needs = Needs()
    for term in terms:
        if isinstance(term, PluginTerm) and reads_states(term):
            needs = needs.with_hidden(*range(teacher.layers + 1))
        if not isinstance(term, INTERMEDIATE_TERMS):
            continue
        layers = (layer for _, layer in layer_pairs(term, student, teacher))
        add = needs.with_attention if isinstance(term, ATTENTION_TERMS) else needs.with_hidden
        needs = add(*layers)
    return needs


def check_terms(terms: Sequence[TermConfig], student: Shape, teacher: Shape | None) -> None:
    """Check the terms against the shapes of both models, before any model is loaded."""
    for term in terms:
        if compares(term) and teacher is None:
            raise ConfigError(
                f"{term.loss} compares with a teacher, and this stage has no teacher; remove the "
                "term"
            )
        if isinstance(term, INTERMEDIATE_TERMS) and teacher is not None:
            pairs = layer_pairs(term, student, teacher)
            if isinstance(term, RelationFsp) and len(pairs) == 1:
                raise TeacherError(
                    "relation_fsp needs two mapped layers, and layer_mapping "
                    f"{term.layer_mapping} maps the only layer that the student has; set two "
                    "pairs in that term of the objective: layer_mapping: "
                    f'["0:0", "{student.layers}:{teacher.layers}"]'
                )
        if isinstance(term, ATTENTION_TERMS) and teacher is not None:
            check_heads(term, student, teacher)
        if isinstance(term, PluginTerm):
            term.check(student, teacher)
