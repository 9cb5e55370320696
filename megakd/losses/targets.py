"""Loss terms on labels and on teacher outputs: fp32 sums over a unit, without a host sync.

The control flow does not depend on values of tensors.

A group computes the terms that share work. `per_unit` is the factor of one unit: the world size
divided by the unit's global count. Every term is therefore an average over the whole step, for
any split into micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

import megakd_kernels
from megakd.config.terms import (
    HardCrossEntropy,
    HardMse,
    SoftTarget,
    SoftTargetMse,
    Source,
    Unit,
    on_source,
    term_name,
)
from megakd.data.batch import (
    IGNORE,
    SOURCE_UNITS,
    Draws,
    Head,
    LogitWarp,
    LossInputs,
    Outputs,
    TopK,
    UnitCounter,
    has_label,
    is_of,
    second_targets,
    source_counters,
)
from megakd.models.outputs import Needs

DIVERGENCE = {
    "soft_target_kl": "forward_kl",
    "soft_target_reverse_kl": "reverse_kl",
    "soft_target_jsd": "jsd",
    "soft_target_skew_kl": "skew_kl",
    "soft_target_skew_reverse_kl": "skew_rkl",
    "soft_target_tvd": "tvd",
}
AGREEMENT = "top1_agreement"
_OF_KEPT: Mapping[type, str] = {TopK: "soft_target_kl_top_k", Draws: "soft_target_kl_draws"}
"""Forward KL to the kept part of an answer has names of its own: it is another quantity."""
OUTSIDE_TOP_K = "mass_outside_top_k"
"""The teacher's probability of all tokens that were not kept; the mean over targets."""
STATISTICS = frozenset(
    on_source(name, source)
    for name in (AGREEMENT, *_OF_KEPT.values(), OUTSIDE_TOP_K)
    for source in (None, *get_args(Source))
)
"""Names of what is measured beside the terms, over all targets, and of each source."""
_HARD = "hard_cross_entropy"
_SHARED = {"temperature": 1.0, "beta": 0.5, "skew": 0.1}
"""Options that all terms of a pass share, with their values in a pass whose terms lack them."""
_CPU_CHUNK_MB = 128.0
"""Chunks of training on a CPU; the 64 MiB of a lone loss take 2 % more of a step's time."""


class Evaluated(NamedTuple):
    """Result of a group of terms.

    total: weighted and normalised, with gradient.
    sums: detached, the sum of each term over its unit.
    """

    total: Tensor
    sums: dict[str, Tensor]


class TermGroup(nn.Module):
    """Base class of terms that are computed together.

    units: unit of each term, by the name of the term.
    counters: functions that count units which only this group has, by the name of the unit.
    needs: outputs that the terms need from a model's forward.
    """

    units: Mapping[str, Unit]
    counters: Mapping[Unit, UnitCounter] = MappingProxyType({})
    needs = Needs()

    def bind(self, learners: Mapping[str, nn.Module]) -> None:
        """Do nothing; a group that reads weights finds them in the learners, by role."""

    def forward(self, inputs: LossInputs) -> Evaluated:
        """Return the weighted total of the group, not yet scaled, and the sums of its terms."""
        raise TypeError(f"{type(self).__name__} does not implement forward()")

    def of_one_term(self, inputs: LossInputs, total: Tensor) -> Evaluated:
        """Return the result of a group whose only term has the sum `total` over its unit."""
        ((name, unit),) = self.units.items()
        scale = inputs.weights[name] * inputs.per_unit[unit]
        return Evaluated(total * scale, {name: total.detach()})

    def of_all(self, all_inputs: Sequence[LossInputs]) -> list[Evaluated]:
        """Return one result for each; only the sum of the scaled totals has a meaning."""
        results = [self(inputs) for inputs in all_inputs]
        return [
            one._replace(total=one.total * inputs.scale)
            for one, inputs in zip(results, all_inputs, strict=True)
        ]


class LanguageModelTargets(TermGroup):
    """Hard and soft targets of a language model, computed from (hidden, head) without [B, T, V].

    Terms and inputs share a pass over the rows where possible, so that there is one gradient of
    the head. Each target of a model with two vocabularies is predicted by one of two heads.

    soft: soft targets of one source.
    hard: whether the group has the cross-entropy with the labels of that source.
    source: the source of the positions that are summed and counted; None: all positions.
    """

    def __init__(
        self, soft: tuple[SoftTarget, ...], *, hard: bool, source: Source | None = None
    ) -> None:
        super().__init__()
        self.soft, self.hard = soft, hard
        self.source: Source | None = source
        self.hard_name = on_source(_HARD, source)
        self.agreement = on_source(AGREEMENT, source)
        self.unit = "targets" if source is None else SOURCE_UNITS[source]
        names = [*([self.hard_name] if hard else []), *map(term_name, soft)]
        if soft:
            names.append(self.agreement)
        if [term.loss for term in soft] == ["soft_target_kl"]:  # may be of a kept part
            names += [on_source(name, source) for name in (*_OF_KEPT.values(), OUTSIDE_TOP_K)]
        self.units = dict.fromkeys(names, self.unit)
        self.counters = source_counters(source)

    def forward(self, inputs: LossInputs) -> Evaluated:
        """Return nats (times T² for the soft terms), summed over positions with a label."""
        rows = self._stacked([inputs])
        out = self._scored(rows, inputs)
        first = Evaluated(out.loss, self._sums(out, rows, slice(None), 1.0))
        student, batch = inputs.student.second, second_targets(inputs.batch)
        if student is None or batch is None:
            return first
        if inputs.teacher is not None:
            raise TypeError("soft targets need one vocabulary, and this model predicts from two")
        second = self(replace(inputs, student=student, batch=batch))
        sums = {name: value + second.sums[name] for name, value in first.sums.items()}
        return Evaluated(first.total + second.total, sums)

    def of_all(self, all_inputs: Sequence[LossInputs]) -> list[Evaluated]:
        """Compute inputs together that differ only in the student's outputs and in scale."""
        groups: dict[object, list[int]] = {}
        for index, inputs in enumerate(all_inputs):
            alike = (id(inputs.teacher), tuple(inputs.weights.items()))
            groups.setdefault(alike if inputs.scale > 0 else index, []).append(index)
        results: dict[int, Evaluated] = {}
        for indices in groups.values():
            together = self._together([all_inputs[index] for index in indices])
            results.update(zip(indices, together, strict=True))
        return [results[index] for index in range(len(all_inputs))]

    def _together(self, all_inputs: Sequence[LossInputs]) -> list[Evaluated]:
        first, *others = all_inputs
        if not others or first.student.second is not None:
            return super().of_all(all_inputs)
        rows = self._stacked(all_inputs)
        out = self._scored(rows, first)
        count = rows.labels.numel() // len(all_inputs)
        sums = [
            self._sums(out, rows, slice(index * count, (index + 1) * count), inputs.scale)
            for index, inputs in enumerate(all_inputs)
        ]
        totals = [out.loss, *(out.loss.new_zeros(()) for _ in others)]
        return [Evaluated(*pair) for pair in zip(totals, sums, strict=True)]

    def _scored(self, rows: TargetRows, inputs: LossInputs) -> megakd_kernels.KDOutput:
        if rows.kept is not None:
            return self._scored_from_cache(rows, rows.kept, inputs)
        _, head = _language(inputs.student)
        weight, bias = head.read()
        ours, theirs, of_teacher = head.warp, LogitWarp(), (None, None)
        if self.soft:
            _, head = _language(inputs.taught)
            theirs, of_teacher = head.warp, (p if p is None else p.detach() for p in head.read())
        teacher_weight, teacher_bias = of_teacher
        return megakd_kernels.linear_kd_loss(
            rows.student,
            weight,
            rows.teacher,
            teacher_weight,
            rows.labels,
            **divergence_options(self.soft, inputs.weights),
            ce_weight=self._hard_weight(inputs),
            token_weight=rows.weight,
            ignore_index=IGNORE,
            # The kernel divides by it: count / ranks, the inverse of the factor.
            num_items=1.0 / inputs.per_unit[self.unit],
            reduction="num_items",
            student_bias=bias,
            teacher_bias=teacher_bias,
            softcap_s=ours.softcap,
            softcap_t=theirs.softcap,
            logit_scale_s=ours.scale,
            logit_scale_t=theirs.scale,
            chunk_mb=_CPU_CHUNK_MB if rows.student.is_cpu else None,
            impl=inputs.kernels,
        )

    def _scored_from_cache(
        self, rows: TargetRows, kept: TopK | Draws, inputs: LossInputs
    ) -> megakd_kernels.KDOutput:
        """Compute the loss from a cache of the most likely tokens or of random draws.

        With the most likely tokens, all tokens that the cache lacks count as one token, which has
        the remaining probability. With draws, the target is the share of each token in the draws;
        the gradient softmax(student) - shares is an unbiased estimate of the gradient of forward KL
        (Anshumann et al. 2025, https://arxiv.org/abs/2503.16870).
        """
        _, head = _language(inputs.student)
        if head.warp != LogitWarp():
            raise TypeError("a loss on cached probabilities has no factor or cap of logits")
        weight, bias = head.read()
        (term,) = self.soft
        # Tables that are padded for speed may end with rows that the student's does not have.
        ids = kept.ids.masked_fill(kept.ids >= len(weight), -1)
        return megakd_kernels.topk_kd_loss(
            rows.student,
            weight,
            ids,
            kept.logprobs,
            rows.labels,
            mode="renorm" if isinstance(kept, Draws) else "tail",
            t_squared=True,
            kd_weight=inputs.weights[term_name(term)],
            ce_weight=self._hard_weight(inputs),
            token_weight=rows.weight,
            ignore_index=IGNORE,
            num_items=1.0 / inputs.per_unit[self.unit],
            reduction="num_items",
            student_bias=bias,
            impl=inputs.kernels,
        )

    def _sums(
        self, out: megakd_kernels.KDOutput, targets: TargetRows, rows: slice, scale: float
    ) -> dict[str, Tensor]:
        divergences, kept = out.row_divergences[:, rows].sum(1) / scale, targets.kept
        sums = {term_name(t): divergences[i] for i, t in enumerate(self.soft)}
        if kept is not None:
            sums = {on_source(_OF_KEPT[type(kept)], self.source): divergences[0]}
        if isinstance(kept, TopK):
            mass = kept.logprobs.float().exp().where(kept.ids >= 0, 0.0).sum(-1).flatten()
            counts = has_label(targets.labels.flatten()) & (mass > 0)  # 0: without an answer
            outside = (1.0 - mass).clamp(min=0.0).where(counts, 0.0)
            sums[on_source(OUTSIDE_TOP_K, self.source)] = outside[rows].sum()
        if self.hard:
            sums[self.hard_name] = out.row_ce[rows].sum() / scale
        if self.soft:
            sums[self.agreement] = out.row_agrees[rows].sum()
        return sums

    def _stacked(self, all_inputs: Sequence[LossInputs]) -> TargetRows:
        first, count = all_inputs[0], len(all_inputs)
        of_source = is_of(self.source, first.batch)

        def chosen(values: Tensor) -> Tensor:
            # One row stays for texts of the other source, so that every step has a backward through
            # the same operations.
            return values if of_source else values.flatten(0, -2)[:1]

        labels = first.batch.target_labels
        labels = labels if of_source else torch.full_like(labels.flatten()[:1], IGNORE)
        kept = first.taught.kept if self.soft else None
        taught = chosen(_language(first.taught)[0]) if self.soft and kept is None else None
        kept = None if kept is None else kept._make(map(chosen, kept))
        if count == 1:
            return TargetRows(chosen(_language(first.student)[0]), taught, labels, None, kept)
        labels = labels.flatten()
        # Filled on the device: copying a list to a GPU would wait for the GPU.
        scales = [torch.full_like(labels, one.scale, dtype=torch.float32) for one in all_inputs]
        return TargetRows(
            torch.cat(
                [chosen(_language(inputs.student)[0]).flatten(0, -2) for inputs in all_inputs]
            ),
            None if taught is None else taught.flatten(0, -2).repeat(count, 1),
            labels.repeat(count),
            torch.cat(scales),
            None if kept is None else kept._make(p.flatten(0, -2).repeat(count, 1) for p in kept),
        )

    def _hard_weight(self, inputs: LossInputs) -> float | Tensor:
        """Return the weight as a tensor: the number 0 would remove the term from the report."""
        if not self.hard:
            return 0.0
        return inputs.per_unit[self.unit].new_full((), inputs.weights[self.hard_name])


class TargetRows(NamedTuple):
    """Inputs of one pass of `LanguageModelTargets`, [N] rows; weight None: equal weights."""

    student: Tensor
    teacher: Tensor | None
    labels: Tensor
    weight: Tensor | None
    kept: TopK | Draws | None = None


def _language(outputs: Outputs) -> tuple[Tensor, Head]:
    if outputs.hidden is None or outputs.head is None:
        raise TypeError("a loss on (hidden, head) received a classifier, which has logits")
    return outputs.hidden, outputs.head


def divergence_options(terms: Sequence[SoftTarget], weights: Mapping[str, float]) -> dict[str, Any]:
    """Return the options of the kernels for soft terms that share a pass over the rows."""
    divergence = {DIVERGENCE[term.loss]: weights[term_name(term)] for term in terms}
    shared = {
        name: next((getattr(term, name) for term in terms if hasattr(term, name)), default)
        for name, default in _SHARED.items()
    }
    return {"divergence": divergence or "forward_kl", "t_squared": True, **shared}


def language_model_groups(
    soft: Sequence[SoftTarget], hard: Sequence[HardCrossEntropy] = ()
) -> list[LanguageModelTargets]:
    """Return as few groups as possible; terms of one group have the same source.

    The hard term of a source is part of the first group of the source.
    """
    groups: list[LanguageModelTargets] = []
    for source in (None, "rollouts", "data"):
        has_hard = any(term.on == source for term in hard)
        passes = one_pass_groups([term for term in soft if term.on == source])
        for number, terms in enumerate(passes or [[]] * has_hard):
            is_hard = has_hard and number == 0
            groups.append(LanguageModelTargets(tuple(terms), hard=is_hard, source=source))
    return groups


def one_pass_groups(terms: Sequence[SoftTarget]) -> list[list[SoftTarget]]:
    """Return the terms in groups whose divergences can be computed in one pass over the rows."""
    groups: list[list[SoftTarget]] = []
    for term in terms:
        for group in groups:
            values = ({vars(one)[n] for one in (*group, term) if n in vars(one)} for n in _SHARED)
            if all(len(different) <= 1 for different in values):
                group.append(term)
                break
        else:
            groups.append([term])
    return groups


class ClassTargets(TermGroup):
    """Soft targets of a classifier and its labels, which share a pass over the rows.

    soft: divergences, summed over all rows, labelled or not.
    hard: the cross-entropy, summed over the rows that carry a label, if the group has it.

    Where a row has any number of labels, each class is a choice between yes and no, whose logits
    are the output and 0: the softmax of the two is the sigmoid of the output. A term is the mean
    over the C classes of a row: the cross-entropy is that of `BCEWithLogitsLoss`, and a divergence
    is that of Bernoulli distributions, at a temperature those of the divided outputs.
    """

    def __init__(self, soft: tuple[SoftTarget, ...], hard: HardCrossEntropy | None) -> None:
        super().__init__()
        self.soft, self.hard = soft, hard
        names = [*(term.loss for term in soft), AGREEMENT] if soft else []
        self.units = dict.fromkeys(names, "examples")
        if hard is not None:
            self.units[_HARD] = _unit_of_labels(hard)

    def forward(self, inputs: LossInputs) -> Evaluated:
        """Return nats (times T² for the soft terms), summed over rows."""
        soft = [term for term in self.soft if term.loss not in inputs.left_out]
        has_labels = self.hard is not None and _HARD not in inputs.left_out
        per_unit, batch = inputs.per_unit, inputs.batch
        student, taught = _logits(inputs.student), _logits(inputs.taught) if soft else None
        labels, valid, classes = batch.labels, batch.valid.any(dim=1), 1
        if batch.multi_label:
            classes = labels.shape[1]
            student, taught = _yes_or_no(student), None if taught is None else _yes_or_no(taught)
            valid = valid[:, None].expand_as(labels)
            labels = (1.0 - labels).nan_to_num(nan=IGNORE).long()  # yes is the first of the two
            per_unit = {unit: one / classes for unit, one in per_unit.items()}
        out = megakd_kernels.kd_loss_from_logits(
            student,
            taught,
            labels if has_labels else None,
            **divergence_options(soft, inputs.weights),
            kd_weight=per_unit["examples"],
            ce_weight=inputs.weights[_HARD] * per_unit[self.units[_HARD]] if has_labels else 0.0,
            ignore_index=IGNORE,
            valid=valid if soft else None,
            impl=inputs.kernels,
        )
        sums = {term.loss: out.divergence_sums[index] for index, term in enumerate(soft)}
        if soft:
            sums[AGREEMENT] = out.agreement
        if has_labels:
            sums[_HARD] = out.ce_sum
        if classes > 1:
            sums = {name: value / classes for name, value in sums.items()}
        return Evaluated(out.loss, sums)


def _yes_or_no(logits: Tensor) -> Tensor:
    """Return [B, C, 2] logits of yes and no for the outputs [B, C] of sigmoids."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


class WeightedClasses(TermGroup):
    """`hard_cross_entropy` of a classifier with weights of the classes or smoothed labels."""

    def __init__(self, term: HardCrossEntropy) -> None:
        super().__init__()
        self.units = {term.loss: _unit_of_labels(term)}
        self.smoothing = term.label_smoothing
        if term.class_weights == "balanced":
            raise TypeError(
                "balanced class weights must be converted to weights by label before the loss"
            )
        weights = term.class_weights
        self.class_weights = None if weights is None else tuple(weights.values())
        self._on_device: Tensor | None = None

    def forward(self, inputs: LossInputs) -> Evaluated:
        """Return the sum over labelled rows, in nats.

        A row has the value (1 - s)·w[y]·-log p[y] + s/C·sum of w[c]·-log p[c].
        """
        logits, labels = _logits(inputs.student), inputs.batch.labels
        if self.class_weights is not None and self._on_device is None:
            # [C] fp32, not a buffer: DeepSpeed would round a buffer to the model's dtype.
            self._on_device = torch.tensor(self.class_weights, device=logits.device)
        # Masked before the softmax: the gradient of the softmax at NaN is NaN, even times 0.
        known = has_label(labels).unsqueeze(-1)
        total = functional.cross_entropy(
            logits.float().where(known, 0.0),
            labels,
            weight=self._on_device,
            label_smoothing=self.smoothing,
            ignore_index=IGNORE,
            reduction="sum",
        )
        return self.of_one_term(inputs, total)


class RegressionScores(TermGroup):
    """`hard_mse` or `soft_target_mse` of a regressor, which has one output per row."""

    def __init__(self, term: HardMse | SoftTargetMse) -> None:
        super().__init__()
        self.needs_teacher = isinstance(term, SoftTargetMse)
        self.units = {term.loss: "examples" if self.needs_teacher else "targets"}

    def forward(self, inputs: LossInputs) -> Evaluated:
        """Return the squared error, summed over labelled rows or, with a teacher, valid rows."""
        scores = _logits(inputs.student).float().squeeze(-1)
        if self.needs_teacher:
            target = _logits(inputs.taught).float().squeeze(-1)
            counts = inputs.batch.valid.any(dim=1)
        else:
            target = inputs.batch.labels.float()
            counts = has_label(target)
        # Masked before the square: the gradient of the square at NaN is NaN, even times 0.
        error = (scores - target).where(counts, torch.zeros_like(scores))
        return self.of_one_term(inputs, error.square().sum())


def class_groups(
    soft: Sequence[SoftTarget], hard: HardCrossEntropy | None
) -> list[ClassTargets | WeightedClasses]:
    """Return as few groups as possible; the hard term joins the first."""
    groups: list[ClassTargets | WeightedClasses] = []
    if hard is not None and (hard.class_weights is not None or hard.label_smoothing):
        groups.append(WeightedClasses(hard))
        hard = None
    for terms in one_pass_groups(soft):
        groups.append(ClassTargets(tuple(terms), hard))
        hard = None
    return groups if hard is None else [*groups, ClassTargets((), hard)]


def _unit_of_labels(term: HardCrossEntropy) -> Unit:
    return "examples" if term.count == "rows" else "targets"


def _logits(outputs: Outputs) -> Tensor:
    if outputs.logits is None:
        raise TypeError("a loss on logits received a language model, which has (hidden, head)")
    return outputs.logits
