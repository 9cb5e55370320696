"""Hand values of the loss terms, and how the terms of a language model are computed together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_scene import Matrix
from loss_terms import term_of
from unit_counts import counts_of

from megakd.contract.batch import IGNORE, Batch, Knowledge, LossInputs
from megakd.contract.terms import TermConfig
from megakd.contract.unit_counts import count_units
from megakd.contract.views import Shape
from megakd.losses.bundle import unit_scales
from megakd.losses.objective import Objective, build_objective

CE = term_of("hard_cross_entropy")
KL = term_of("soft_target_kl")
REVERSE = term_of("soft_target_reverse_kl")
JSD = term_of("soft_target_jsd")
SKEW = term_of("soft_target_skew_kl")
SKEW_REVERSE = term_of("soft_target_skew_reverse_kl")
TVD = term_of("soft_target_tvd")
ONE_EACH = unit_scales(counts_of(1, 1, 1), 1).weights


def answer_of(hidden: torch.Tensor, head: torch.Tensor) -> Knowledge:
    return Knowledge(hidden=hidden, head=Matrix(head))  # type: ignore[arg-type]


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
        term = term_of("soft_target_mse", row_weight="teacher_loss")
        outputs, plain = torch.tensor([[1.0], [0.5]]), 0.25
    shape = Shape(2, 4, outputs.shape[1])
    objective = build_objective((term,), task, shape, shape)
    batch = Batch({}, torch.tensor([label]), torch.ones(1, 1, dtype=torch.bool))
    both = [Knowledge(logits=logits[None]) for logits in outputs]

    (actual,) = objective([LossInputs(*both, batch, objective.weights, ONE_EACH)])

    assert actual.total.item() == pytest.approx(plain * expected, rel=1e-5)


@pytest.mark.parametrize(("count", "divisor"), [("labels", 2), ("rows", 4)])
def test_the_loss_on_labels_is_divided_by_the_labelled_rows_or_by_all_rows(count, divisor):
    term, shape = replace(CE, count=count), Shape(2, 4, 2)
    objective = build_objective((term,), "classification", shape, None)
    labels = torch.tensor([0, IGNORE, 1, IGNORE])
    batch = Batch({}, labels, torch.ones(4, 1, dtype=torch.bool))
    logits = torch.tensor([[1 / 4, 3 / 4], [1 / 8, 7 / 8]]).log().repeat_interleave(2, 0)
    student = Knowledge(logits=logits.requires_grad_())
    units = unit_scales(count_units([batch]), 1).weights

    (actual,) = objective([LossInputs(student, None, batch, objective.weights, units)])
    actual.total.backward()

    assert actual.total.item() == pytest.approx((math.log(4) + math.log(8 / 7)) / divisor)
    expected = torch.tensor([[-3 / 4, 3 / 4], [0, 0], [1 / 8, -1 / 8], [0, 0]]) / divisor
    torch.testing.assert_close(logits.grad, expected)
    # The logged value has the same divisor.
    assert units[objective.units[CE.loss]].item() == 1 / divisor


TRUSTED = replace(KL, row_weight="teacher_loss")
SMOOTHED = replace(CE, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("terms", "calls"),
    [
        ((CE, KL), 1),
        ((replace(CE, count="rows"), KL, REVERSE, TVD), 1),
        ((CE, KL, replace(REVERSE, temperature=2.0)), 2),
        ((CE, TRUSTED, REVERSE), 2),
        ((CE, TRUSTED), 2),
        ((SMOOTHED, KL, JSD), 1),
    ],
)
def test_terms_of_a_classifier_share_calls_and_add_up_to_each_alone(kernel_calls, terms, calls):
    seen = kernel_calls("kd_loss_from_logits")
    terms = tuple(replace(term, weight=0.5 + n) for n, term in enumerate(terms))
    generator = torch.Generator().manual_seed(0)
    logits, taught = (torch.randn(6, 4, generator=generator) for _ in range(2))
    valid = torch.tensor([True, True, True, True, True, False])
    batch = Batch({}, torch.tensor([0, IGNORE, 3, 2, IGNORE, IGNORE]), valid[:, None])

    def solved(*terms: TermConfig) -> tuple[dict[str, float], torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        objective = build_objective(terms, "classification", Shape(2, 4, 4), Shape(2, 4, 4))
        units = unit_scales(count_units([batch]), 1).weights
        answers = Knowledge(logits=leaf), Knowledge(logits=taught)
        (result,) = objective([LossInputs(*answers, batch, objective.weights, units)])
        result.total.backward()
        sums = {name: value.item() for name, value in result.sums.items()}
        return {"total": result.total.item(), **sums}, leaf.grad

    values, gradient = solved(*terms)
    together, alone = len(seen), [solved(term) for term in terms]

    assert together == calls
    assert values.pop("total") == pytest.approx(sum(one.pop("total") for one, _ in alone))
    torch.testing.assert_close(gradient, sum(slope for _, slope in alone))
    expected = {name: value for one, _ in alone for name, value in one.items()}
    assert values == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def calls(kernel_calls):
    return kernel_calls("linear_kd_loss")


def language_model(*terms: TermConfig) -> Objective:
    shape = Shape(2, 3, 5)
    return build_objective(terms, "causal_lm", shape, shape)


def reading(objective: Objective, **weights: float) -> LossInputs:
    torch.manual_seed(0)
    batch = Batch({}, torch.tensor([[1, 4, IGNORE]]), torch.ones(1, 3, dtype=torch.bool))
    student, teacher = (answer_of(torch.randn(1, 3, 3), torch.randn(5, 3)) for _ in range(2))
    units = unit_scales(counts_of(1, 2, 3), 1).weights
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
        term_of("soft_target_reverse_kl", temperature=3.0),
        term_of("soft_target_reverse_kl", t_squared=False),
        term_of("soft_target_skew_reverse_kl", skew=0.3),
    ],
    ids=["another temperature", "another scale", "another skew"],
)
def test_terms_that_need_calls_of_their_own_get_them_and_the_hard_term_is_in_one(calls, other):
    objective = language_model(CE, SKEW, other)

    total, sums = objective([reading(objective)])[0]

    assert [options["temperature"] for _, options in calls] == [1.0, other.temperature]
    assert [options["skew"] for _, options in calls] == [0.1, getattr(other, "skew", 0.1)]
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
    for one, actual, leaf, gradient in zip(readings, together, leaves, gradients, strict=True):
        (alone,) = objective([replace(one, scale=1.0)])
        (expected,) = torch.autograd.grad(alone.total * one.scale, leaf)
        torch.testing.assert_close(gradient, expected)
        assert actual.sums.keys() == alone.sums.keys()
        for name, value in alone.sums.items():
            torch.testing.assert_close(actual.sums[name].float(), value.float())
    alone_totals = [objective([one])[0].total for one in readings]
    torch.testing.assert_close(total, torch.stack(alone_totals).sum())


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": answer_of(torch.randn(1, 3, 3), torch.randn(5, 3))},
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
    totals = [torch.stack([one.total for one in each]).sum() for each in (together, apart)]
    torch.testing.assert_close(*totals)
    for each, alone in zip(together, apart, strict=True):
        for name, value in alone.sums.items():
            torch.testing.assert_close(each.sums[name].float(), value.float())


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_agreement_counts_where_both_choose_the_same(task):
    objective = build_objective((KL,), task, *[Shape(2, 3, 3)] * 2)
    eye, away = torch.eye(3), torch.eye(3).flip(0)
    if task == "causal_lm":
        batch = Batch({}, torch.tensor([[0, 1, IGNORE]]), torch.ones(1, 3, dtype=torch.bool))
        answers = answer_of(eye[None], eye), answer_of(eye[None], away)
    else:  # the last row is no row
        batch = Batch({}, torch.full((3,), IGNORE), torch.tensor([[1], [1], [0]]).bool())
        answers = Knowledge(logits=eye), Knowledge(logits=away[[0, 1, 0]])

    result = objective([LossInputs(*answers, batch, objective.weights, ONE_EACH)])[0]

    assert result.sums["top1_agreement"].item() == 1  # the second of both
