"""The weighted list of loss terms of a stage, checked against both models before they load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megakd.config import TaskType
from megakd.errors import ConfigError, TeacherError
from megakd.knowledge import Needs
from megakd.losses import (
    Evaluated,
    HardClasses,
    HiddenStates,
    Reading,
    Scores,
    SoftClasses,
    TermGroup,
    language_model_groups,
)
from megakd.stage import IGNORE, UNITS, Batch, Unit
from megakd.terms import HIDDEN_TERMS, SOFT_TARGET_DIVERGENCES, HiddenCosine, HiddenMse, TermConfig

WEIGHTED_LOSS = "loss"
"""Among the terms of a report: what was minimised, all passes, scales and weights in it."""


class Shape(NamedTuple):
    """What a loss must know of a model: layers, hidden width, rows of the output."""

    layers: int
    width: int
    vocabulary: int


class Objective(nn.Module):
    """The terms of a stage, and the projections they learn.

    Called inside the student engine's forward: weights that a loss reads are then right at
    every ZeRO stage.
    """

    def __init__(self, groups: Sequence[TermGroup], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        self.weights = dict(weights)
        self.units: dict[str, Unit] = {n: u for g in groups for n, u in g.units.items()}
        self.needs = Needs(hidden_states=any(g.needs.hidden_states for g in groups))
        self.needs_teacher = any(g.needs_teacher for g in groups)

    def forward(self, reading: Reading) -> Evaluated:
        """The weighted total with gradient, and every term's detached sum."""
        evaluated = [group(reading) for group in self.groups]
        total = torch.stack([e.total.float() for e in evaluated]).sum()
        return Evaluated(total, {name: s for e in evaluated for name, s in e.sums.items()})


def build_objective(
    terms: Sequence[TermConfig], task: TaskType, student: Shape, teacher: Shape | None
) -> Objective:
    """Builds the terms, or says which one cannot work with these models.

    Args:
        terms: the run config's list.
        task: classification, regression or causal_lm.
        student: the student's shape.
        teacher: the teacher's, None for supervised training.

    Raises:
        ConfigError: a term needs a teacher and there is none.
        TeacherError: layers or vocabularies that a chosen term cannot match.
    """
    check_terms(terms, task, student, teacher)
    soft = tuple(t for t in terms if isinstance(t, SOFT_TARGET_DIVERGENCES))
    hard = any(t.loss == "hard_cross_entropy" for t in terms)
    groups: list[TermGroup] = []
    if task == "causal_lm":
        groups.extend(language_model_groups(soft, hard=hard))
    else:
        groups.extend(HardClasses() for _ in range(hard))
        groups.extend(SoftClasses(t) for t in soft)
    groups.extend(Scores(t.loss) for t in terms if t.loss in {"hard_mse", "soft_target_mse"})
    for term in terms:
        if isinstance(term, HIDDEN_TERMS) and teacher is not None:
            pairs = layer_pairs(term, student, teacher)
            groups.append(HiddenStates(term, pairs, (student.width, teacher.width)))
    return Objective(groups, {t.loss: t.weight for t in terms})


def objective_needs(terms: Sequence[TermConfig]) -> Needs:
    """What the terms ask of a model's forward."""
    return Needs(hidden_states=any(isinstance(term, HIDDEN_TERMS) for term in terms))


def check_terms(
    terms: Sequence[TermConfig], task: TaskType, student: Shape, teacher: Shape | None
) -> None:
    """All that can be said of the terms from both models' configs, before anything loads."""
    for term in terms:
        compares = isinstance(term, HIDDEN_TERMS) or term.loss.startswith("soft_target")
        if compares and teacher is None:
            raise ConfigError(f"{term.loss} compares with a teacher and this stage has none")
        if isinstance(term, SOFT_TARGET_DIVERGENCES) and task != "causal_lm" and teacher:
            _check_classes(term.loss, student, teacher)
        if isinstance(term, HIDDEN_TERMS) and teacher is not None:
            layer_pairs(term, student, teacher)


def _check_classes(loss: str, student: Shape, teacher: Shape) -> None:
    if student.vocabulary != teacher.vocabulary:
        raise TeacherError(
            f"{loss}: the teacher has {teacher.vocabulary} classes, the student "
            f"{student.vocabulary}; soft targets need the same classes"
        )


def layer_pairs(
    term: HiddenMse | HiddenCosine, student: Shape, teacher: Shape
) -> tuple[tuple[int, int], ...]:
    """(student layer, teacher layer) numbers; 0 is the embedding output.

    `uniform` spreads the student's layers 1..Ls over the teacher's: s -> round(s · Lt / Ls).

    Raises:
        TeacherError: a pair points beyond a model, named as it was written.
    """
    mapping = term.layer_mapping
    if mapping == "last":
        return ((student.layers, teacher.layers),)
    if mapping == "uniform":
        ratio = teacher.layers / student.layers
        return tuple((s, round(s * ratio)) for s in range(1, student.layers + 1))
    pairs = []
    for text in mapping:
        s, t = (int(number) for number in text.split(":"))
        if s > student.layers or t > teacher.layers:
            raise TeacherError(
                f"{term.loss}.layer_mapping {text}: the student has {student.layers} layers, the "
                f"teacher {teacher.layers} (0 is the embedding output)"
            )
        pairs.append((s, t))
    return tuple(pairs)


def count_units(batches: Sequence[Batch]) -> Tensor:
    """[3] int64 on the batches' device: this rank's examples, targets and tokens of a step."""
    counts = []
    for batch in batches:
        labels = batch.labels
        has_label = ~labels.isnan() if labels.is_floating_point() else labels != IGNORE
        counts.append(
            torch.stack([batch.valid.any(dim=1).sum(), has_label.sum(), batch.valid.sum()])
        )
    return torch.stack(counts).sum(dim=0)


def unit_weights(counts: Tensor, world_size: int) -> dict[Unit, Tensor]:
    """World size over each unit's global count, at least one: DeepSpeed averages over ranks."""
    per_unit = world_size / counts.clamp(min=1).float()
    return {unit: per_unit[i] for i, unit in enumerate(UNITS)}
