"""The loss terms of a stage: checked against both models before they load, built, and weighted.

A run and a memory plan build the same terms, and need the same outputs of models for them.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from torch import Tensor, nn

from megakd.config.task import LANGUAGE_TASKS, SOFT_LABELS, TaskType
from megakd.config.terms import (
    ATTENTION_TERMS,
    INTERMEDIATE_TERMS,
    AttentionMse,
    AttentionTerm,
    HardCrossEntropy,
    HardMse,
    Heads,
    MethodTerm,
    PluginTerm,
    RelationFsp,
    RelationKl,
    Shape,
    SoftTarget,
    SoftTargetMse,
    TermConfig,
    Unit,
    hard_terms,
    layer_pairs,
    term_name,
)
from megakd.data.batch import COUNTERS, LossInputs, Outputs, UnitCounter
from megakd.data.splits import Splits
from megakd.errors import ConfigError, TeacherError, suggestion
from megakd.losses.layer_terms import (
    AttentionMatrices,
    FspMatrices,
    HiddenStates,
    Projections,
    Relations,
)
from megakd.losses.router_balance import ROUTER_BALANCE, RouterBalance
from megakd.losses.targets import (
    STATISTICS,
    Evaluated,
    RegressionScores,
    TermGroup,
    class_groups,
    language_model_groups,
)
from megakd.models.fitting import ModelSource, ReadyTeacher
from megakd.models.outputs import Needs
from megakd.models.routing import has_balance
from megakd.stage import Stage

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

    def forward(self, all_inputs: Sequence[LossInputs]) -> list[Evaluated]:
        """Return for each the weighted and scaled total with gradient, and detached sums.

        The inputs are of one batch, by views of one width. A group may put the total of several
        of them into one, so only the sum of all totals has a meaning.
        """
        left_out = frozenset.intersection(*(inputs.left_out for inputs in all_inputs))
        groups = cast("list[TermGroup]", list(self.groups))
        wanted = [g for g in groups if not left_out.issuperset(g.units.keys() - STATISTICS)]
        if not wanted:
            return [Evaluated(_zero(inputs.student), {}) for inputs in all_inputs]
        all_inputs = [replace(inputs, left_out=left_out) for inputs in all_inputs]
        of_groups = [group.of_all(all_inputs) for group in wanted]
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


def _zero(answer: Outputs) -> Tensor:
    """Return 0 with a gradient of 0 for every weight that a model's outputs were computed with.

    A constant would have no backward, with which ZeRO reduces gradients and frees gathered weights.
    """
    outputs = answer.hidden if answer.logits is None else answer.logits
    if outputs is None:
        raise TypeError("a model without logits and without hidden states has no loss")
    # Padding may hold NaN, and NaN times 0 is NaN.
    return outputs.float().nan_to_num(0.0, 0.0, 0.0).mul(0.0).sum()


def build_objective(
    terms: Sequence[TermConfig],
    task: TaskType,
    student: Shape,
    teacher: Shape | None,
    *,
    balances: bool = False,
) -> Objective:
    """Build the objective of a stage from its terms; without a teacher, for supervised training.

    Args:
        balances: whether the routers of a model that learns may be balanced.
    """
    check_terms(terms, student, teacher)
    soft = tuple(t for t in terms if isinstance(t, SoftTarget))
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
    weights = {term_name(t): t.weight for t in terms}
    if balances:
        groups.append(RouterBalance())
        weights[ROUTER_BALANCE] = 1.0
    return Objective(groups, weights)


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
        if isinstance(term, PluginTerm) and term.reads_hidden_states:
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
        if term.needs_teacher and teacher is None:
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
            _check_heads(term, student, teacher)
        if isinstance(term, PluginTerm):
            term.check(student, teacher)


def _check_heads(term: AttentionTerm, student: Shape, teacher: Shape) -> None:
    if isinstance(term, RelationKl):
        relation_heads(term, student, teacher)
        return
    ours = _heads(term, student, "student").queries
    theirs = _heads(term, teacher, "teacher").queries
    if ours != theirs:
        raise TeacherError(
            f"attention_mse: the teacher has {theirs} attention heads, the student {ours}, and "
            "attention_mse compares head by head; use relation_kl, which supports different "
            "numbers of heads"
        )


def relation_heads(term: RelationKl, student: Shape, teacher: Shape) -> int:
    """Return the number of parts into which the vectors of both models are cut.

    Raises:
        TeacherError: the number does not divide a width.
    """
    ours, theirs = _heads(term, student, "student"), _heads(term, teacher, "teacher")
    count = term.relation_heads or theirs.queries
    widths = {
        f"{model}'s {relation.replace('query_key', 'query')} vectors": heads.width
        * (heads.keys if relation in {"key", "value"} else heads.queries)
        for relation in term.relations
        for model, heads in (("student", ours), ("teacher", theirs))
    }
    for vectors, width in widths.items():
        if width % count:
            common = math.gcd(*widths.values())
            fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            given = "" if term.relation_heads else " (null: the teacher's attention heads)"
            raise TeacherError(
                f"relation_kl.relation_heads {count}{given} does not divide the {vectors}, which "
                f"are {width} wide; use a number that divides all of the vectors: {fitting}"
            )
    return count


def _heads(term: AttentionTerm, model: Shape, role: str) -> Heads:
    if model.heads is None:
        raise TeacherError(
            f"{term.loss}: megakd does not support the attention of the {role}; remove the term, "
            f"or use another model as {role}"
        )
    return model.heads


@dataclass(frozen=True, kw_only=True)
class StageLosses:
    """The loss terms of a stage between models of known shapes.

    teacher: the shape of the first teacher; None without a teacher. If losses compare layers, all
        teachers of a stage have the same shape.
    families: the families of the models that learn, in their order.
    balances: see `build_objective`.
    """

    stage: Stage
    task: TaskType
    student: Shape
    teacher: Shape | None
    families: tuple[str, ...] = ()
    balances: bool = False

    def check_outputs(self, key: str, teacher: ReadyTeacher) -> None:
        """Raise if the losses read more of a teacher than its cache or its server gives."""
        part = "server" if teacher.spec.cache is None else "cache"
        if (teacher.spec.cache or teacher.spec.server) and self.teacher_needs() != Needs():
            raise ConfigError(
                f"{key}.{part} holds only the outputs of the teacher, and the losses of this "
                "method need more; remove the key, or use only soft targets"
            )

    def teacher_needs(self) -> Needs:
        """Return the outputs that the losses and the strategy need from the teachers' forward."""
        if self.teacher is None:
            return Needs()
        needs = teacher_needs(self.stage.objective, self.student, self.teacher)
        return self._with_states(needs, self.teacher)

    def check(self) -> None:
        check_terms(self.stage.objective, self.student, self.teacher)
        for term in self.stage.objective:
            if isinstance(term, MethodTerm):
                term.check(self.student, self.teacher, self.families)

    def objective(self) -> Objective:
        """Build the objective, which also states the outputs needed from the student's forward."""
        made = build_objective(
            self.stage.objective, self.task, self.student, self.teacher, balances=self.balances
        )
        made.needs = self._with_states(made.needs, self.student)
        return made

    def _with_states(self, needs: Needs, shape: Shape) -> Needs:
        is_read = any(one.weigh for one in self.stage.strategy.passes(0))
        return needs.with_hidden(shape.layers) if is_read else needs


def stage_losses(
    stage: Stage,
    task: TaskType,
    *,
    learners: Mapping[str, ModelSource],
    teachers: Sequence[ModelSource],
    classes: int,
) -> StageLosses:
    """Return the losses of a stage with its learners (`learning_models`) and frozen teachers."""
    student, *beside = (shape_of(source, task, classes) for source in learners.values())
    frozen = (shape_of(source, task, classes) for source in teachers)
    teacher = next(iter((*frozen, *beside)), None)
    if SOFT_LABELS in stage.teachers:
        teacher = Shape(0, 0, classes)
    families = tuple(source.config.model_type for source in learners.values())
    return StageLosses(
        stage=stage,
        task=task,
        student=student,
        teacher=teacher,
        families=families,
        balances=task == "causal_lm"
        and any(has_balance(source.config) for source in learners.values()),
    )


def label_objective(source: ModelSource, task: TaskType, classes: int) -> Objective:
    """Return the objective on labels for a task, for a model without a teacher."""
    return build_objective(hard_terms(task), task, shape_of(source, task, classes), None)


def shape_of(source: ModelSource, task: TaskType, classes: int) -> Shape:
    """Return the shape of a model, as losses need it; a classifier has the classes of the data."""
    config, architecture = source.config, source.architecture
    outputs = {"classification": classes, "regression": 1}.get(task)
    return Shape(
        architecture.number_of_layers(config),
        architecture.hidden_width(config),
        config.vocab_size if outputs is None else outputs,
        architecture.heads(config),
    )


def with_class_weights(terms: Sequence[TermConfig], splits: Splits) -> tuple[TermConfig, ...]:
    """Return the terms with a weight for every label, in the order of the data's labels.

    `balanced` gives label c the weight rows / (labels · rows of c), counted over the labelled
    training rows, so that the mean weight of these rows is 1.
    """
    return _with_weights(terms, lambda term: _in_order(term, splits))


def with_even_weights(terms: Sequence[TermConfig], classes: int) -> tuple[TermConfig, ...]:
    """Return the terms with weight 1 for every label, for a memory plan without data."""
    even = {str(number): 1.0 for number in range(classes)}
    return _with_weights(terms, lambda _: even)


def _with_weights(
    terms: Sequence[TermConfig], weights_of: Callable[[HardCrossEntropy], dict[str, float]]
) -> tuple[TermConfig, ...]:
    return tuple(
        replace(term, class_weights=weights_of(term))
        if isinstance(term, HardCrossEntropy) and term.class_weights is not None
        else term
        for term in terms
    )


def _in_order(term: HardCrossEntropy, splits: Splits) -> dict[str, float]:
    given, labels = term.class_weights, splits.label_names
    if not isinstance(given, Mapping):
        return _balanced(labels, np.asarray(splits.train["label"]))
    for label in given:
        if label not in labels:
            raise ConfigError(
                "hard_cross_entropy.class_weights: the data have no label "
                f'"{label}"{suggestion(label, labels)} (known: '
                f"{', '.join(labels[:10])})"
            )
    missing = [label for label in labels if label not in given]
    if missing:
        raise ConfigError(
            f"hard_cross_entropy.class_weights: no weight for {', '.join(missing[:10])}; set a "
            "weight for every label (1 is neutral)"
        )
    return {label: given[label] for label in labels}


def _balanced(labels: Sequence[str], numbers: np.ndarray) -> dict[str, float]:
    counts = np.bincount(numbers[numbers >= 0], minlength=len(labels))
    absent = [label for label, count in zip(labels, counts, strict=True) if count == 0]
    if absent:
        raise ConfigError(
            "hard_cross_entropy.class_weights: balanced divides by the number of rows of a label, "
            f"and no training row has the label {', '.join(absent[:10])}; set the weights by label"
        )
    return dict(zip(labels, (counts.sum() / (len(labels) * counts)).tolist(), strict=True))


class PluginLoss(TermGroup):
    """A term whose sum over the unit is computed by another package.

    The term may read the states of all `layers` of the student.
    """

    def __init__(self, term: PluginTerm, layers: int) -> None:
        super().__init__()
        self.term = term
        self.units = {term.loss: term.unit}
        self.needs = Needs()
        if term.reads_hidden_states:
            self.needs = self.needs.with_hidden(*range(layers + 1))

    def forward(self, inputs: LossInputs) -> Evaluated:
        total = self.term.total(inputs.student, inputs.teacher, inputs.batch)
        if not isinstance(total, Tensor) or total.dim() != 0:
            given = f"shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total)
            raise ConfigError(
                f"objective: {self.term.loss} returned {given}; total() must return the sum over "
                f"{self.term.unit} as a tensor without dimensions"
            )
        return self.of_one_term(inputs, total.float())


def logits_of(outputs: Outputs) -> Tensor:
    """Return [N, C] fp32 logits: of a classifier's rows, or of a language model's targets.

    The logits of a language model are formed for this call, all N x vocabulary elements at once;
    megakd's own losses compute them in parts.
    """
    if outputs.logits is not None:
        return outputs.logits.float()
    if outputs.hidden is None or outputs.head is None:
        raise TypeError("the hidden states or the head, which form the logits, were not kept")
    weight, bias = outputs.head.read()
    logits = (outputs.hidden.to(weight.dtype) @ weight.T).float()  # [N, V]
    logits = logits if bias is None else logits + bias.float()
    return outputs.head.warp(logits).flatten(0, -2)
