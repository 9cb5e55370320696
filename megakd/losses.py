"""Loss terms over `megakd_kernels`: fp32 sums over a unit, no host sync, no branch on values.

A group computes the terms that share work. `per_unit` says what one unit weighs: world size
over the unit's global count, so that every term is an average over the whole step however it
is cut into micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

import megakd_kernels
from megakd.knowledge import Needs
from megakd.stage import IGNORE, Batch, Knowledge, Unit
from megakd.terms import (
    HiddenCosine,
    HiddenMse,
    SoftTargetJsd,
    SoftTargetKl,
    SoftTargetReverseKl,
)

DIVERGENCE = {
    "soft_target_kl": "forward_kl",
    "soft_target_reverse_kl": "reverse_kl",
    "soft_target_jsd": "jsd",
}
AGREEMENT = "top1_agreement"
SoftTarget = SoftTargetKl | SoftTargetReverseKl | SoftTargetJsd


class Evaluated(NamedTuple):
    """total: weighted and normalised, with gradient. sums: detached, per term, over its unit."""

    total: Tensor
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """What a group of terms computes from."""

    student: Knowledge
    teacher: Knowledge | None
    batch: Batch
    weights: Mapping[str, float]
    per_unit: Mapping[Unit, Tensor]


class TermGroup(nn.Module):
    """Terms computed together.

    units: each term's unit, by its name.
    needs: what they ask of a model's forward.
    needs_teacher: whether a teacher must have run.
    """

    units: Mapping[str, Unit]
    needs = Needs()
    needs_teacher = False

    def forward(self, reading: Reading) -> Evaluated:
        """The group's weighted total and its terms' sums."""
        raise TypeError(f"{type(self).__name__} computes nothing")


class HardClasses(TermGroup):
    """`hard_cross_entropy` of a classifier, over the rows that carry a label."""

    units: Mapping[str, Unit] = MappingProxyType({"hard_cross_entropy": "targets"})

    def forward(self, reading: Reading) -> Evaluated:
        """Cross-entropy in nats, summed over labelled rows."""
        logits, labels = _logits(reading.student), reading.batch.labels
        out = megakd_kernels.kd_loss_from_logits(
            logits, None, labels, t_squared=True, ce_weight=1.0, ignore_index=IGNORE
        )
        scale = reading.weights["hard_cross_entropy"] * reading.per_unit["targets"]
        return Evaluated(out.loss * scale, {"hard_cross_entropy": out.ce_sum})


class SoftClasses(TermGroup):
    """One soft-target divergence of a classifier, over all rows, labelled or not."""

    needs_teacher = True

    def __init__(self, term: SoftTarget) -> None:
        super().__init__()
        self.term = term
        self.units = {term.loss: "examples", AGREEMENT: "examples"}

    def forward(self, reading: Reading) -> Evaluated:
        """The divergence in nats times T², summed over rows."""
        out = megakd_kernels.kd_loss_from_logits(
            _logits(reading.student),
            _logits(_teacher(reading)),
            None,
            divergence=DIVERGENCE[self.term.loss],
            beta=getattr(self.term, "beta", 0.5),
            temperature=self.term.temperature,
            t_squared=self.term.t_squared,
            valid=reading.batch.valid.any(dim=1),
        )
        scale = reading.weights[self.term.loss] * reading.per_unit["examples"]
        sums = {self.term.loss: out.divergence_sums[0], AGREEMENT: out.agreement}
        return Evaluated(out.loss * scale, sums)


class LanguageModelTargets(TermGroup):
    """Hard and soft targets of a causal LM in one pass over (hidden, head), never [B, T, V].

    Terms that share a temperature share the pass, so that one head gradient exists.
    """

    def __init__(self, soft: tuple[SoftTarget, ...], *, hard: bool) -> None:
        super().__init__()
        self.soft, self.hard = soft, hard
        self.needs_teacher = bool(soft)
        names = [*(["hard_cross_entropy"] if hard else []), *(t.loss for t in soft)]
        self.units = dict.fromkeys([*names, *([AGREEMENT] if soft else [])], "targets")

    def forward(self, reading: Reading) -> Evaluated:
        """Nats (times T² for the soft terms), summed over positions with a label."""
        student, labels = reading.student, reading.batch.labels
        head, bias = _head(student)
        teacher_head, teacher_bias = self._teacher_head(reading)
        divergence = {DIVERGENCE[t.loss]: reading.weights[t.loss] for t in self.soft}
        shared = self.soft[0] if self.soft else SoftTargetKl(loss="soft_target_kl")
        jsd = next((t for t in self.soft if isinstance(t, SoftTargetJsd)), None)
        out = megakd_kernels.linear_kd_loss(
            _hidden(student),
            head,
            reading.teacher.hidden if reading.teacher and self.soft else None,
            teacher_head,
            labels,
            divergence=divergence or "forward_kl",
            beta=jsd.beta if jsd else 0.5,
            temperature=shared.temperature,
            t_squared=shared.t_squared,
            ce_weight=self._hard_weight(reading),
            ignore_index=IGNORE,
            num_items=1.0 / reading.per_unit["targets"],
            reduction="num_items",
            student_bias=bias,
            teacher_bias=teacher_bias,
        )
        sums = {t.loss: out.divergence_sums[i] for i, t in enumerate(self.soft)}
        if self.hard:
            sums["hard_cross_entropy"] = out.ce_sum
        if self.soft:
            sums[AGREEMENT] = out.agreement
        return Evaluated(out.loss, sums)

    def _hard_weight(self, reading: Reading) -> float | Tensor:
        """As a tensor, for the number 0 would leave the term out of the report too."""
        if not self.hard:
            return 0.0
        return reading.per_unit["targets"].new_full((), reading.weights["hard_cross_entropy"])

    def _teacher_head(self, reading: Reading) -> tuple[Tensor | None, Tensor | None]:
        return _head(_teacher(reading)) if self.soft else (None, None)


class Scores(TermGroup):
    """`hard_mse` or `soft_target_mse` of a regressor, the mean over outputs per row."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.needs_teacher = name == "soft_target_mse"
        self.units = {name: "examples" if self.needs_teacher else "targets"}

    def forward(self, reading: Reading) -> Evaluated:
        """Squared error, summed over the rows that count."""
        scores = _logits(reading.student).float().squeeze(-1)
        target, counts = self._target(reading)
        # Before the square: its gradient at NaN is NaN, even times 0.
        error = (scores - target).where(counts, torch.zeros_like(scores))
        total = error.square().sum()
        scale = reading.weights[self.name] * reading.per_unit[self.units[self.name]]
        return Evaluated(total * scale, {self.name: total.detach()})

    def _target(self, reading: Reading) -> tuple[Tensor, Tensor]:
        if self.needs_teacher:
            scores = _logits(_teacher(reading)).float().squeeze(-1)
            return scores, reading.batch.valid.any(dim=1)
        labels = reading.batch.labels.float()
        return labels, ~labels.isnan()


class HiddenStates(TermGroup):
    """`hidden_mse` or `hidden_cosine` over mapped layers, with a projection where widths differ.

    Mean over width and mapped layers per token. The projections are learned with the student,
    kept for resuming, and dropped at export.
    """

    needs = Needs(hidden_states=True)
    needs_teacher = True

    def __init__(
        self,
        term: HiddenMse | HiddenCosine,
        pairs: tuple[tuple[int, int], ...],
        widths: tuple[int, int],
    ) -> None:
        super().__init__()
        self.name, self.pairs = term.loss, pairs
        self.units = {term.loss: "tokens"}
        self.loss = (
            megakd_kernels.hidden_mse_projection_loss
            if isinstance(term, HiddenMse)
            else megakd_kernels.hidden_cosine_projection_loss
        )
        student, teacher = widths
        count = len(pairs) if student != teacher else 0
        self.projections = nn.ModuleList(
            nn.Linear(student, teacher, bias=False) for _ in range(count)
        )

    def _projection(self, index: int) -> Tensor | None:
        if not len(self.projections):
            return None
        return cast("nn.Linear", self.projections[index]).weight

    def forward(self, reading: Reading) -> Evaluated:
        """The mean over layers of each layer's sum over tokens."""
        teacher = _teacher(reading)
        layers = [
            self.loss(
                reading.student.hidden_states[s],
                self._projection(i),
                teacher.hidden_states[t],
                valid=reading.batch.valid,
            )
            for i, (s, t) in enumerate(self.pairs)
        ]
        total = torch.stack(layers).mean()
        scale = reading.weights[self.name] * reading.per_unit["tokens"]
        return Evaluated(total * scale, {self.name: total.detach()})


def _logits(knowledge: Knowledge) -> Tensor:
    if knowledge.logits is None:
        raise TypeError("a loss on logits met a language model, which has (hidden, head)")
    return knowledge.logits


def _hidden(knowledge: Knowledge) -> Tensor:
    if knowledge.hidden is None:
        raise TypeError("a loss on (hidden, head) met a classifier, which has logits")
    return knowledge.hidden


def _head(knowledge: Knowledge) -> tuple[Tensor, Tensor | None]:
    if knowledge.head is None:
        raise TypeError("a loss on (hidden, head) met a classifier, which has logits")
    return knowledge.head.read()


def _teacher(reading: Reading) -> Knowledge:
    if reading.teacher is None:
        raise TypeError("a term that compares with a teacher was planned without one")
    return reading.teacher


def language_model_groups(
    soft: tuple[SoftTarget, ...], *, hard: bool
) -> tuple[LanguageModelTargets, ...]:
    """One group per (temperature, T²); the hard term rides with the first."""
    keys = dict.fromkeys((t.temperature, t.t_squared) for t in soft)
    together = [tuple(t for t in soft if (t.temperature, t.t_squared) == key) for key in keys]
    if not together:
        return (LanguageModelTargets((), hard=True),) if hard else ()
    first, *rest = together
    return (
        LanguageModelTargets(first, hard=hard),
        *(LanguageModelTargets(terms, hard=False) for terms in rest),
    )
