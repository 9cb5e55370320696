"""Loss terms of classifiers and regressors on labels and teacher outputs, summed over rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import megakd_kernels
from megakd.contract.batch import IGNORE, Knowledge, LossInputs, Unit
from megakd.contract.terms import HardCrossEntropy, HardMse, SoftTarget, SoftTargetMse
from megakd.losses.targets import AGREEMENT, DIVERGENCE, Evaluated, TermGroup


class HardClasses(TermGroup):
    """`hard_cross_entropy` of a classifier, summed over the rows that carry a label."""

    def __init__(self, term: HardCrossEntropy) -> None:
        super().__init__()
        self.unit: Unit = "examples" if term.count == "rows" else "targets"
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
        """Return the cross-entropy in nats, summed over labelled rows."""
        if self.class_weights is None and not self.smoothing:
            total = self._plain(reading)
        else:
            total = self._weighted(_logits(reading.student), reading.batch.labels)
        scale = reading.weights["hard_cross_entropy"] * reading.per_unit[self.unit]
        return Evaluated(total * scale, {"hard_cross_entropy": total.detach()})

    def _plain(self, reading: LossInputs) -> Tensor:
        out = megakd_kernels.kd_loss_from_logits(
            _logits(reading.student),
            None,
            reading.batch.labels,
            t_squared=True,
            ce_weight=1.0,
            ignore_index=IGNORE,
            impl=reading.kernels,
        )
        return out.loss

    def _weighted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over rows of (1 - s)·w[y]·-log p[y] + s/C·sum of w[c]·-log p[c]."""
        if self.class_weights is not None and self._on_device is None:
            # [C] fp32, not a buffer: DeepSpeed would round a buffer to the model's dtype.
            self._on_device = torch.tensor(self.class_weights, device=logits.device)
        # Masked before the softmax: the gradient of the softmax at NaN is NaN, even times 0.
        known = (labels != IGNORE).unsqueeze(-1)
        return functional.cross_entropy(
            logits.float().where(known, 0.0),
            labels,
            weight=self._on_device,
            label_smoothing=self.smoothing,
            ignore_index=IGNORE,
            reduction="sum",
        )


class SoftClasses(TermGroup):
    """One soft-target divergence of a classifier, over all rows, labelled or not."""

    needs_teacher = True

    def __init__(self, term: SoftTarget) -> None:
        super().__init__()
        self.term = term
        self.units = {term.loss: "examples", AGREEMENT: "examples"}

    def forward(self, reading: LossInputs) -> Evaluated:
        """Return the divergence in nats times T² (if `t_squared`), summed over rows."""
        taught = _logits(reading.taught)
        trusts = getattr(self.term, "row_weight", "equal") == "teacher_loss"
        out = megakd_kernels.kd_loss_from_logits(
            _logits(reading.student),
            taught,
            None,
            divergence=DIVERGENCE[self.term.loss],
            beta=getattr(self.term, "beta", 0.5),
            skew=getattr(self.term, "skew", 0.1),
            temperature=self.term.temperature,
            t_squared=self.term.t_squared,
            token_weight=_trust_in_classes(taught, reading.batch.labels) if trusts else None,
            valid=reading.batch.valid.any(dim=1),
            impl=reading.kernels,
        )
        scale = reading.weights[self.term.loss] * reading.per_unit["examples"]
        sums = {self.term.loss: out.divergence_sums[0], AGREEMENT: out.agreement}
        return Evaluated(out.loss * scale, sums)


class RegressionScores(TermGroup):
    """`hard_mse` or `soft_target_mse` of a regressor, which has one output per row."""

    def __init__(self, term: HardMse | SoftTargetMse) -> None:
        super().__init__()
        self.name = term.loss
        self.needs_teacher = isinstance(term, SoftTargetMse)
        self.trusts = getattr(term, "row_weight", "equal") == "teacher_loss"
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


def _trust_in_classes(taught: Tensor, labels: Tensor) -> Tensor:
    """Return [B] fp32: 1 / (1 + the teacher's cross-entropy), and 1 for rows without label."""
    missed = functional.cross_entropy(taught.float(), labels, ignore_index=IGNORE, reduction="none")
    return 1 / (1 + missed)


def _logits(knowledge: Knowledge) -> Tensor:
    if knowledge.logits is None:
        raise TypeError("a loss on logits received a language model, which has (hidden, head)")
    return knowledge.logits
