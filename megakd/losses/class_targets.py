"""Loss terms of classifiers and regressors on labels and teacher outputs, summed over rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

import megakd_kernels
from megakd.contract.batch import IGNORE, Knowledge, LossInputs, Unit
from megakd.contract.terms import (
    HardCrossEntropy,
    HardMse,
    SoftTarget,
    SoftTargetKl,
    SoftTargetMse,
)
from megakd.losses.targets import (
    AGREEMENT,
    DIVERGENCE,
    Evaluated,
    TermGroup,
    one_pass_groups,
    option_of,
    trusts,
)

_HARD = "hard_cross_entropy"


class ClassTargets(TermGroup):
    """Soft targets of a classifier and its labels, which share a pass over the rows.

    soft: divergences, summed over all rows, labelled or not.
    hard: the cross-entropy, summed over the rows that carry a label, if the group has it.
    """

    def __init__(self, soft: tuple[SoftTarget, ...], hard: HardCrossEntropy | None) -> None:
        super().__init__()
        self.soft, self.hard = soft, hard
        names = [*(term.loss for term in soft), AGREEMENT] if soft else []
        self.units = dict.fromkeys(names, "examples")
        if hard is not None:
            self.units[_HARD] = _unit_of_labels(hard)

    def forward(self, reading: LossInputs) -> Evaluated:
        """Return nats (times T² for the soft terms with `t_squared`), summed over rows."""
        soft = [term for term in self.soft if term.loss not in reading.left_out]
        has_labels = self.hard is not None and _HARD not in reading.left_out
        out = self._scored(reading, soft, has_labels=has_labels)
        sums = {term.loss: out.divergence_sums[index] for index, term in enumerate(soft)}
        if soft:
            sums[AGREEMENT] = out.agreement
        if has_labels:
            sums[_HARD] = out.ce_sum
        return Evaluated(out.loss, sums)

    def _scored(
        self, reading: LossInputs, soft: Sequence[SoftTarget], *, has_labels: bool
    ) -> megakd_kernels.KDOutput:
        shared = soft[0] if soft else SoftTargetKl(loss="soft_target_kl")
        divergence = {DIVERGENCE[term.loss]: reading.weights[term.loss] for term in soft}
        per_unit, batch = reading.per_unit, reading.batch
        return megakd_kernels.kd_loss_from_logits(
            _logits(reading.student),
            _logits(reading.taught) if soft else None,
            batch.labels if has_labels else None,
            divergence=divergence or "forward_kl",
            beta=option_of(soft, "beta", 0.5),
            skew=option_of(soft, "skew", 0.1),
            temperature=shared.temperature,
            t_squared=shared.t_squared,
            kd_weight=per_unit["examples"],
            ce_weight=reading.weights[_HARD] * per_unit[self.units[_HARD]] if has_labels else 0.0,
            token_weight=_trust_in_classes(reading) if trusts(shared) else None,
            ignore_index=IGNORE,
            valid=batch.valid.any(dim=1) if soft else None,
            impl=reading.kernels,
        )


class WeightedClasses(TermGroup):
    """`hard_cross_entropy` of a classifier with weights of the classes or smoothed labels."""

    def __init__(self, term: HardCrossEntropy) -> None:
        super().__init__()
        self.unit = _unit_of_labels(term)
        self.units = {term.loss: self.unit}
        self.smoothing = term.label_smoothing
        if term.class_weights == "balanced":
            raise TypeError(
                "balanced class weights must be converted to weights by label before the loss"
            )
        weights = term.class_weights
        self.class_weights = None if weights is None else tuple(weights.values())
        self._on_device: Tensor | None = None

    def forward(self, reading: LossInputs) -> Evaluated:
        """Return the sum over labelled rows, in nats.

        A row has the value (1 - s)·w[y]·-log p[y] + s/C·sum of w[c]·-log p[c].
        """
        logits, labels = _logits(reading.student), reading.batch.labels
        if self.class_weights is not None and self._on_device is None:
            # [C] fp32, not a buffer: DeepSpeed would round a buffer to the model's dtype.
            self._on_device = torch.tensor(self.class_weights, device=logits.device)
        # Masked before the softmax: the gradient of the softmax at NaN is NaN, even times 0.
        known = (labels != IGNORE).unsqueeze(-1)
        total = functional.cross_entropy(
            logits.float().where(known, 0.0),
            labels,
            weight=self._on_device,
            label_smoothing=self.smoothing,
            ignore_index=IGNORE,
            reduction="sum",
        )
        scale = reading.weights[_HARD] * reading.per_unit[self.unit]
        return Evaluated(total * scale, {_HARD: total.detach()})


class RegressionScores(TermGroup):
    """`hard_mse` or `soft_target_mse` of a regressor, which has one output per row."""

    def __init__(self, term: HardMse | SoftTargetMse) -> None:
        super().__init__()
        self.name = term.loss
        self.needs_teacher = isinstance(term, SoftTargetMse)
        self.trusts = trusts(term)
        self.units = {term.loss: "examples" if self.needs_teacher else "targets"}

    def forward(self, reading: LossInputs) -> Evaluated:
        """Return the squared error, summed over labelled rows or, with a teacher, valid rows."""
        scores = _logits(reading.student).float().squeeze(-1)
        target, counts = self._target(reading)
        # Masked before the square: the gradient of the square at NaN is NaN, even times 0.
        error = (scores - target).where(counts, torch.zeros_like(scores))
        rows = error.square()
        if self.trusts:
            # The teacher's squared error is 0 for rows without label.
            missed = (target - reading.batch.labels.float()).square().nan_to_num(0.0)
            rows = rows * (1 / (1 + missed))
        total = rows.sum()
        scale = reading.weights[self.name] * reading.per_unit[self.units[self.name]]
        return Evaluated(total * scale, {self.name: total.detach()})

    def _target(self, reading: LossInputs) -> tuple[Tensor, Tensor]:
        if self.needs_teacher:
            scores = _logits(reading.taught).float().squeeze(-1)
            return scores, reading.batch.valid.any(dim=1)
        labels = reading.batch.labels.float()
        return labels, ~labels.isnan()


def class_groups(
    soft: Sequence[SoftTarget], hard: HardCrossEntropy | None
) -> list[ClassTargets | WeightedClasses]:
    """Return as few groups as possible; the hard term joins the first that weighs rows alike."""
    groups: list[ClassTargets | WeightedClasses] = []
    if hard is not None and (hard.class_weights is not None or hard.label_smoothing):
        groups.append(WeightedClasses(hard))
        hard = None
    for terms in one_pass_groups(soft):
        if trusts(terms[0]):
            groups.append(ClassTargets(tuple(terms), None))
        else:
            groups.append(ClassTargets(tuple(terms), hard))
            hard = None
    return groups if hard is None else [*groups, ClassTargets((), hard)]


def _unit_of_labels(term: HardCrossEntropy) -> Unit:
    return "examples" if term.count == "rows" else "targets"


def _trust_in_classes(reading: LossInputs) -> Tensor:
    """Return [B] fp32: 1 / (1 + the teacher's cross-entropy), and 1 for rows without label."""
    logits, labels = _logits(reading.taught).float(), reading.batch.labels
    missed = functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return 1 / (1 + missed)


def _logits(knowledge: Knowledge) -> Tensor:
    if knowledge.logits is None:
        raise TypeError("a loss on logits received a language model, which has (hidden, head)")
    return knowledge.logits
