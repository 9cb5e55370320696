"""Hand values of the loss terms, how terms are computed together, and what may not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_scene import Matrix
from loss_terms import term_of
from torch import Tensor
from unit_counts import counts_of

from megakd.config.terms import Shape, TermConfig
from megakd.data.batch import IGNORE, AttentionVectors, Batch, Knowledge, LossInputs, count_units
from megakd.losses import layer_terms
from megakd.losses.bundle import unit_scales
from megakd.losses.layer_terms import AttentionMatrices, HiddenStates, Relations
from megakd.losses.objective import Objective, build_objective

CE = term_of("hard_cross_entropy")
SOFT = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
KL, REVERSE, JSD, SKEW, SKEW_REVERSE, TVD = (term_of(f"soft_target_{name}") for name in SOFT)
ONE_EACH = unit_scales(counts_of(1, 1, 1), 1).weights


def answer_of(hidden: torch.Tensor, head: torch.Tensor) -> Knowledge:
    return Knowledge(hidden=hidden, head=Matrix(head))  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "divisor"), [("labels", 2), ("rows", 4)])
def test_the_loss_on_labels_is_divided_by_the_labelled_rows_or_by_all_rows(count, divisor):
    term = replace(CE, count=count)
    objective = build_objective((term,), "classification", Shape(2, 4, 2), None)
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


SMOOTHED = replace(CE, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("terms", "calls"),
    [
        ((CE, KL), 1),
        ((replace(CE, count="rows"), KL, REVERSE, TVD), 1),
        ((CE, KL, replace(REVERSE, temperature=2.0)), 2),
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


@pytest.mark.parametrize(
    ("terms", "options"),
    [
        ((CE, KL, REVERSE, JSD, SKEW, SKEW_REVERSE, TVD), [(1.0, 0.1)]),
        ((CE, SKEW, replace(REVERSE, temperature=3.0)), [(1.0, 0.1), (3.0, 0.1)]),
        ((CE, SKEW, replace(SKEW_REVERSE, skew=0.3)), [(1.0, 0.1), (1.0, 0.3)]),
    ],
    ids=["alike", "another temperature", "another skew"],
)
def test_terms_of_a_language_model_share_a_call_or_get_their_own(calls, terms, options):
    objective = language_model(*terms)

    total, sums = objective([reading(objective)])[0]

    assert [(call["temperature"], call["skew"]) for _, call in calls] == options
    apart = [alone([reading(alone)])[0] for alone in map(language_model, terms)]
    assert total.item() == pytest.approx(sum(alone.total.item() for alone in apart), rel=1e-6)
    for alone in apart:
        assert all(sums[name].item() == pytest.approx(v.item()) for name, v in alone.sums.items())


def several(objective: Objective, scales: Sequence[float]) -> list[LossInputs]:
    """Return the outputs of several views of one head for one batch."""
    first = reading(objective)
    heads = first.student.head
    states = torch.randn(len(scales), 1, 3, 3).unbind()
    students = [Knowledge(hidden=one.requires_grad_(), head=heads) for one in states]
    return [replace(first, student=s, scale=x) for s, x in zip(students, scales, strict=True)]


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({}, 1),
        ({"teacher": answer_of(torch.randn(1, 3, 3), torch.randn(5, 3))}, 2),
        ({"weights": {"hard_cross_entropy": 0.2, "soft_target_kl": 1.0, TVD.loss: 1.0}}, 2),
        ({"scale": 0.0}, 2),
    ],
    ids=["alike", "teacher", "weights", "scale"],
)
def test_views_of_one_head_are_scored_in_one_call_unless_of_another_kind(calls, change, count):
    objective = language_model(CE, KL, TVD)
    readings = several(objective, [0.5, 0.3, 0.2])
    readings[1] = replace(readings[1], **change)
    leaves = [one.student.hidden for one in readings]

    together = objective(readings)

    assert len(calls) == count
    total = torch.stack([one.total for one in together]).sum()
    gradients = torch.autograd.grad(total, leaves)
    for one, actual, leaf, gradient in zip(readings, together, leaves, gradients, strict=True):
        (alone,) = objective([replace(one, scale=1.0)])
        (expected,) = torch.autograd.grad(alone.total * one.scale, leaf)
        torch.testing.assert_close(gradient, expected)
        assert one.scale == 0 or actual.sums.keys() == alone.sums.keys()
        for name, value in alone.sums.items():
            torch.testing.assert_close(actual.sums[name].float(), value.float())
    alone_totals = [objective([one])[0].total for one in readings]
    torch.testing.assert_close(total, torch.stack(alone_totals).sum())


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


def vectors(part: Tensor) -> Knowledge:
    """One layer with one head, whose queries, keys and values are equal."""
    return Knowledge(attention=(None, AttentionVectors(part, part, part, part.shape[-1])))


def whole(*lengths: int, **inputs: Any) -> Batch:
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Batch(inputs, torch.zeros(len(lengths)), valid)


def sum_of(group: Any, ours: Knowledge, theirs: Knowledge, batch: Batch) -> float:
    (name,) = group.units
    result = group(LossInputs(ours, theirs, batch, {name: 1.0}, ONE_EACH))
    assert result.total.item() == pytest.approx(result.sums[name].item())
    return result.total.item()


@pytest.mark.parametrize("fit", ["scores", "probabilities", "relation"])
@settings(max_examples=8)
@given(st.lists(st.floats(-30, 30, width=32) | st.just(1e4), min_size=12, max_size=12))
def test_a_loss_on_attention_is_finite_and_never_negative(fit, numbers):
    ours, theirs = map(vectors, torch.tensor(numbers).reshape(2, 1, 3, 2))
    group: Any = Relations(term_of("relation_kl"), ((1, 1),), heads=1, causal=False)
    if fit != "relation":
        term = term_of("attention_mse", fit=fit)
        group = AttentionMatrices(term, ((1, 1),), causal=True)

    result = sum_of(group, ours, theirs, whole(3))

    assert math.isfinite(result)
    assert result >= -1e-5


def test_the_first_position_is_the_first_that_counts_wherever_padding_is():
    term = term_of("hidden_mse", positions="first", layer_mapping=("0:0",))
    group = HiddenStates(term, ((0, 0),), (1, 1))
    states = torch.tensor([[[1.0], [2.0], [4.0]], [[3.0], [5.0], [7.0]], [[9.0], [9.0], [9.0]]])
    valid = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    ours, theirs = Knowledge(hidden_states=(states,)), Knowledge(hidden_states=(states * 0,))

    assert sum_of(group, ours, theirs, Batch({}, torch.zeros(3), valid)) == 2.0**2 + 3.0**2


@pytest.mark.parametrize(
    ("positions", "seen"),
    [
        ([0, 1, 2, 3], ["1000", "1100", "1110", "1111"]),
        ([3, 4, 0, 1], ["1000", "1100", "0010", "0011"]),
        ([0, 0, 0, 1], ["1000", "0100", "0010", "0011"]),  # documents of one token
    ],
)
def test_a_causal_query_sees_the_keys_before_it_in_its_own_document(positions, seen):
    batch = whole(4, position_ids=torch.tensor([positions]))

    result = layer_terms.visible_keys(batch, causal=True)[0].int().tolist()

    assert ["".join(map(str, row)) for row in result] == seen


def test_attention_that_was_not_read_is_an_error_that_names_the_layer():
    term = term_of("attention_mse")
    group = AttentionMatrices(term, ((1, 1),), causal=False)

    with pytest.raises(TypeError, match="attention of layer 1 was not read"):
        sum_of(group, Knowledge(attention=(None, None)), vectors(torch.zeros(1, 2, 1)), whole(2))


@pytest.fixture
def flows() -> list[tuple[Tensor, ...]]:
    """The states of two layers of student and teacher, [B, T, D]."""
    drawn = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    return [tuple(state.requires_grad_() for state in of_model) for of_model in drawn]


def flow_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], **options: Any) -> Tensor:
    """The error of the flow through two layers, all positions of which count."""
    valid = torch.ones(student[0].shape[:2], dtype=torch.bool)
    (result,) = layer_terms.flow_errors(student, teacher, valid=valid, **options)
    return result


def test_a_text_said_twice_flows_as_it_does_once(flows):
    twice = [tuple(torch.cat([state] * 2, 1) for state in flow) for flow in flows]

    torch.testing.assert_close(flow_error(*twice), flow_error(*flows))


@pytest.mark.parametrize("elements", [1, 50, 60])
def test_flow_matrices_of_a_few_rows_at_a_time_give_the_same(monkeypatch, flows, elements):
    whole = flow_error(*flows)
    monkeypatch.setattr(layer_terms, "MATRIX_ELEMENTS", elements)
    actual = flow_error(*flows)

    torch.testing.assert_close(actual, whole)
    slopes = [torch.autograd.grad(error, flows[0]) for error in (actual, whole)]
    torch.testing.assert_close(*slopes)


def test_a_second_derivative_is_refused_and_the_reference_has_it(flows):
    (first, second), _ = flows
    reference = flow_error(*flows, kernels="reference")

    with pytest.raises(RuntimeError, match="do not support second derivatives"):
        torch.autograd.grad(flow_error(*flows), first, create_graph=True)
    (slope,) = torch.autograd.grad(reference, first, create_graph=True)
    assert torch.autograd.grad(slope.sum(), second)[0].any()
