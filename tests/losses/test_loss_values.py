"""Hand values of the loss terms, and how the terms of a language model are computed together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_counts import counts_of

import megakd_kernels
from megakd.contract.batch import IGNORE, Batch, Knowledge, LogitWarp, LossInputs
from megakd.contract.terms import (
    HardCrossEntropy,
    HiddenMse,
    SoftTargetJsd,
    SoftTargetKl,
    SoftTargetMse,
    SoftTargetReverseKl,
    SoftTargetSkewKl,
    SoftTargetSkewReverseKl,
    SoftTargetTvd,
    TermConfig,
)
from megakd.contract.unit_counts import unit_weights
from megakd.contract.views import Shape
from megakd.losses.layer_terms import HiddenStates
from megakd.losses.objective import Objective, build_objective

CE = HardCrossEntropy(loss="hard_cross_entropy")
KL = SoftTargetKl(loss="soft_target_kl")
KL_AT_2 = SoftTargetKl(loss="soft_target_kl", temperature=2.0)
KL_AT_2_PLAIN = SoftTargetKl(loss="soft_target_kl", temperature=2.0, t_squared=False)
REVERSE = SoftTargetReverseKl(loss="soft_target_reverse_kl")
JSD = SoftTargetJsd(loss="soft_target_jsd")
SKEW = SoftTargetSkewKl(loss="soft_target_skew_kl")
SKEW_REVERSE = SoftTargetSkewReverseKl(loss="soft_target_skew_reverse_kl")
TVD = SoftTargetTvd(loss="soft_target_tvd")
LAST = HiddenMse(loss="hidden_mse", layer_mapping="last")
ONE_EACH = unit_weights(counts_of(1, 1, 1), 1)


def named(case: Any) -> str:
    return case.loss


class Matrix:
    """A head that needs no opening."""

    warp = LogitWarp()

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def read(self) -> tuple[torch.Tensor, None]:
        return self.weight, None


def said(hidden: torch.Tensor, head: torch.Tensor) -> Knowledge:
    return Knowledge(hidden=hidden, head=Matrix(head))  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize(
    ("term", "value"),
    [
        # The teacher says (1/2, 1/2), the student (1/4, 3/4), the label is 1; jsd has the middle.
        (CE, math.log(4 / 3)),
        (KL, 0.5 * math.log(4 / 3)),
        (KL_AT_2, 4 * 0.5 * math.log(4 / 3)),
        (KL_AT_2_PLAIN, 0.5 * math.log(4 / 3)),
        (REVERSE, 0.75 * math.log(3) - math.log(2)),
        (JSD, 0.25 * math.log(16 / 15) + 0.125 * math.log(2 / 3) + 0.375 * math.log(6 / 5)),
        # A tenth of the teacher in the student: 11/40 and 29/40; the other way 19/40 and 21/40.
        (SKEW, 0.5 * math.log(20 / 11) + 0.5 * math.log(20 / 29)),
        (SKEW_REVERSE, 0.25 * math.log(10 / 19) + 0.75 * math.log(10 / 7)),
        (TVD, 0.25),
    ],
    ids=lambda case: getattr(case, "loss", ""),
)
def test_a_divergence_has_its_hand_value_in_nats(task, term, value):
    heat = 1.0 if term is CE else term.temperature
    probabilities = torch.tensor([[1 / 4, 3 / 4], [1 / 2, 1 / 2]])

    total, _ = evaluate(task, term, *(heat * probabilities.log()))

    assert total.item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("task", "label", "expected"),
    [
        # The teacher says (1/2, 1/2): its cross-entropy is ln 2 whatever the label.
        ("classification", 1, 1 / (1 + math.log(2))),
        ("classification", IGNORE, 1.0),
        ("regression", 2.0, 1 / (1 + 1.5**2)),
        ("regression", math.nan, 1.0),
    ],
)
def test_a_row_counts_less_where_the_teacher_misses_its_label(task, label, expected):
    if task == "classification":
        term: Any = replace(KL, row_weight="teacher_loss")
        outputs, plain = torch.tensor([[1 / 4, 3 / 4], [1 / 2, 1 / 2]]).log(), 0.5 * math.log(4 / 3)
    else:
        term = SoftTargetMse(loss="soft_target_mse", row_weight="teacher_loss")
        outputs, plain = torch.tensor([[1.0], [0.5]]), 0.25
    shape = Shape(2, 4, outputs.shape[1])
    objective = build_objective((term,), task, shape, shape)
    batch = Batch({}, torch.tensor([label]), torch.ones(1, 1, dtype=torch.bool))
    both = [Knowledge(logits=logits[None]) for logits in outputs]

    (found,) = objective([LossInputs(*both, batch, objective.weights, ONE_EACH)])

    assert found.total.item() == pytest.approx(plain * expected, rel=1e-5)


def evaluate(task: str, term: Any, student: torch.Tensor, teacher: torch.Tensor) -> Any:
    """One row, or one position whose hidden state is its logits; its label is class 1."""
    shape = Shape(2, 4, len(student))
    objective = build_objective((term,), task, shape, shape)  # type: ignore[arg-type]
    label = torch.ones(1, dtype=torch.long) if task == "classification" else torch.ones(1, 1).long()
    batch = Batch({}, label, torch.ones(1, 1, dtype=torch.bool))
    if task == "classification":
        both = [Knowledge(logits=logits[None]) for logits in (student, teacher)]
    else:
        both = [said(x[None, None], torch.eye(len(x))) for x in (student, teacher)]
    return objective([LossInputs(*both, batch, objective.weights, ONE_EACH)])[0]


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("term", [KL, KL_AT_2, REVERSE, JSD, SKEW, SKEW_REVERSE, TVD], ids=named)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.floats(-80, 80, width=32) | st.sampled_from([0.0, 1e4, -1e4])] * 2),
        min_size=2,
        max_size=5,
    )
)
def test_a_divergence_is_never_negative(task, term, logits):
    student, teacher = torch.tensor(logits).T

    total, _ = evaluate(task, term, student, teacher)

    assert math.isfinite(total.item())
    assert total.item() >= -1e-5  # rounding of probabilities to fp32


def test_widths_that_differ_get_a_projection_per_pair_and_equal_widths_none():
    pairs = ((0, 0), (2, 4))

    differing, equal = (HiddenStates(LAST, pairs, widths) for widths in ((4, 6), (4, 4)))

    assert [list(p.shape) for p in differing.parameters()] == [[6, 4], [6, 4]]
    assert list(equal.parameters()) == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of the fused loss."""
    seen: list[dict[str, Any]] = []
    real = megakd_kernels.linear_kd_loss

    def counting(*tensors: Any, **options: Any) -> Any:
        seen.append(options)
        return real(*tensors, **options)

    monkeypatch.setattr(megakd_kernels, "linear_kd_loss", counting)
    return seen


def language_model(*terms: TermConfig) -> Objective:
    shape = Shape(2, 3, 5)
    return build_objective(terms, "causal_lm", shape, shape)


def reading(objective: Objective, **weights: float) -> LossInputs:
    torch.manual_seed(0)
    batch = Batch({}, torch.tensor([[1, 4, IGNORE]]), torch.ones(1, 3, dtype=torch.bool))
    student, teacher = (said(torch.randn(1, 3, 3), torch.randn(5, 3)) for _ in range(2))
    units = unit_weights(counts_of(1, 2, 3), 1)
    return LossInputs(student, teacher, batch, objective.weights | weights, units)


def test_language_model_terms_of_one_temperature_are_one_call(calls):
    objective = language_model(CE, KL, REVERSE, JSD, SKEW, SKEW_REVERSE, TVD)

    total, sums = objective([reading(objective)])[0]

    assert len(calls) == len(objective.groups) == 1
    expected = sum(sums[name] / 2 for name in objective.weights)
    assert total.item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        SoftTargetReverseKl(loss="soft_target_reverse_kl", temperature=3.0),
        SoftTargetReverseKl(loss="soft_target_reverse_kl", t_squared=False),
        SoftTargetSkewReverseKl(loss="soft_target_skew_reverse_kl", skew=0.3),
    ],
    ids=["another temperature", "another scale", "another skew"],
)
def test_terms_that_need_calls_of_their_own_get_them_and_the_hard_term_is_in_one(calls, other):
    objective = language_model(CE, SKEW, other)

    total, sums = objective([reading(objective)])[0]

    assert [call["temperature"] for call in calls] == [1.0, other.temperature]
    assert [call["skew"] for call in calls] == [0.1, getattr(other, "skew", 0.1)]
    alone_terms = [language_model(term) for term in (CE, SKEW, other)]
    apart = [alone([reading(alone)])[0] for alone in alone_terms]
    assert total.item() == pytest.approx(sum(alone.total.item() for alone in apart), rel=1e-6)
    for alone in apart:
        assert all(sums[name].item() == pytest.approx(v.item()) for name, v in alone.sums.items())


def several(objective: Objective, scales: Sequence[float]) -> list[LossInputs]:
    """Return the outputs of several views of one head for one batch."""
    first = reading(objective)
    heads = first.student.head
    return [
        replace(
            first,
            student=Knowledge(hidden=torch.randn(1, 3, 3, requires_grad=True), head=heads),
            scale=scale,
        )
        for scale in scales
    ]


def test_views_of_one_head_are_scored_in_one_call_and_told_apart(calls):
    objective = language_model(CE, KL, TVD)
    readings = several(objective, [0.5, 0.3, 0.2])
    leaves = [one.student.hidden for one in readings]

    together = objective(readings)
    total = torch.stack([one.total for one in together]).sum()
    gradients = torch.autograd.grad(total, leaves)

    assert len(calls) == 1
    for one, found, leaf, gradient in zip(readings, together, leaves, gradients, strict=True):
        (alone,) = objective([replace(one, scale=1.0)])
        (expected,) = torch.autograd.grad(alone.total * one.scale, leaf)
        torch.testing.assert_close(gradient, expected)
        assert found.sums.keys() == alone.sums.keys()
        for name, value in alone.sums.items():
            torch.testing.assert_close(found.sums[name].float(), value.float())
    alone_totals = [objective([one])[0].total for one in readings]
    torch.testing.assert_close(total, torch.stack(alone_totals).sum())


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": said(torch.randn(1, 3, 3), torch.randn(5, 3))},
        {"weights": {"hard_cross_entropy": 0.2, "soft_target_kl": 1.0}},
        {"scale": 0.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_reading_of_another_kind_has_a_call_of_its_own(calls, change):
    objective = language_model(CE, KL)
    readings = several(objective, [0.5, 0.5, 0.5])
    readings[1] = replace(readings[1], **change)

    together = objective(readings)

    assert len(calls) == 2
    apart = [objective([one])[0] for one in readings]
    totals = [torch.stack([one.total for one in found]).sum() for found in (together, apart)]
    torch.testing.assert_close(*totals)
    for found, alone in zip(together, apart, strict=True):
        for name, value in alone.sums.items():
            torch.testing.assert_close(found.sums[name].float(), value.float())


@pytest.mark.parametrize("name", ["hard_cross_entropy", "soft_target_kl"])
def test_a_term_of_weight_0_is_reported_and_does_not_pull(name):
    objective = language_model(CE, KL)
    left = ({"hard_cross_entropy", "soft_target_kl"} - {name}).pop()

    total, sums = objective([reading(objective, **{name: 0.0})])[0]

    assert total.item() == pytest.approx(sums[left].item() / 2, rel=1e-6)
    assert sums[name].item() == pytest.approx(objective([reading(objective)])[0].sums[name].item())
    assert sums[name] > 0


@pytest.mark.parametrize("padded", [(5, 8), (8, 5)], ids=["teacher padded", "student padded"])
def test_vocabularies_of_different_padded_size_are_compared_over_the_ids_they_share(padded):
    objective = language_model(KL)
    given = reading(objective)
    hidden = torch.ones(1, 3, 3)
    heads = [torch.arange(3.0 * rows).reshape(rows, 3).sin() + rows for rows in padded]
    padded_pair = [said(hidden, head) for head in heads]
    cut_pair = [said(hidden, head[:5]) for head in heads]

    totals = [
        objective([LossInputs(*pair, given.batch, given.weights, given.per_unit)])[0].total.item()
        for pair in (padded_pair, cut_pair)
    ]

    assert totals[0] == pytest.approx(totals[1], rel=1e-6)


def test_agreement_counts_the_targets_on_which_both_choose_the_same_token():
    objective = language_model(KL)
    eye, away = torch.eye(3), torch.eye(3).flip(0)
    batch = Batch({}, torch.tensor([[0, 1, IGNORE]]), torch.ones(1, 3, dtype=torch.bool))
    student, teacher = said(eye[None], eye), said(eye[None], away)

    found = objective([LossInputs(student, teacher, batch, objective.weights, ONE_EACH)])[0]

    assert found.sums["top1_agreement"].item() == 1  # token 1 is where both heads agree


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_term_that_compares_refuses_to_run_without_a_teacher(task):
    objective = build_objective((KL,), task, Shape(2, 3, 3), Shape(2, 3, 3))
    student = said(torch.zeros(1, 1, 3), torch.eye(3))._replace(logits=torch.zeros(1, 3))
    batch = Batch({}, torch.ones(1, 1).long(), torch.ones(1, 1, dtype=torch.bool))

    with pytest.raises(TypeError, match="compares with a teacher was planned without a teacher"):
        objective([LossInputs(student, None, batch, objective.weights, ONE_EACH)])[0]
