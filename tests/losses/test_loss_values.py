"""Hand values of the loss terms, how terms are computed together, and what may not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_scene import WIDTHS, Matrix, Scene, term_of
from torch import Tensor
from unit_counts import counts_of

from megakd.config.terms import Shape, TermConfig
from megakd.data.batch import IGNORE, AttentionVectors, Batch, LossInputs, Outputs, count_units
from megakd.losses import layer_terms
from megakd.losses.bundle import unit_scales
from megakd.losses.layer_terms import AttentionMatrices, HiddenStates, Relations
from megakd.losses.objective import build_objective

CE = term_of("hard_cross_entropy")
SOFT = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
KL, REVERSE, JSD, SKEW, SKEW_REVERSE, TVD = (term_of(f"soft_target_{name}") for name in SOFT)
ONE_EACH = unit_scales(counts_of(1, 1, 1), 1).per_unit


def answer_of(hidden: torch.Tensor, head: torch.Tensor) -> Outputs:
    return Outputs(hidden=hidden, head=Matrix(head))  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "divisor"), [("labels", 2), ("rows", 4)])
def test_the_loss_on_labels_is_divided_by_the_labelled_rows_or_by_all_rows(count, divisor):
    term = replace(CE, count=count)
    objective = build_objective((term,), "classification", Shape(2, 4, 2), None)
    labels = torch.tensor([0, IGNORE, 1, IGNORE])
    batch = Batch({}, labels, torch.ones(4, 1, dtype=torch.bool))
    logits = torch.tensor([[1 / 4, 3 / 4], [1 / 8, 7 / 8]]).log().repeat_interleave(2, 0)
    student = Outputs(logits=logits.requires_grad_())
    units = unit_scales(count_units([batch]), 1).per_unit

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

    assert len(calls_together("classification", terms, seen)) == calls


def calls_together(task: str, terms: tuple[TermConfig, ...], calls: list[Any]) -> list[Any]:
    """The calls of terms together, which have the total, sums and gradients of each alone."""
    together, shared = Scene(task, *terms).result(), [*calls]
    alone = [Scene(task, term).result() for term in terms]
    torch.testing.assert_close(together.total, sum(one.total for one in alone))
    for name, gradient in together.gradients.items():
        parts = [one.gradients[name] for one in alone if name in one.gradients]
        torch.testing.assert_close(gradient, sum(parts))
    expected = {name: float(value) for one in alone for name, value in one.sums.items()}
    actual = {name: float(value) for name, value in together.sums.items()}
    assert actual == pytest.approx(expected, rel=1e-5)
    return shared


@pytest.fixture
def calls(kernel_calls):
    return kernel_calls("linear_kd_loss")


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
    shared = calls_together("causal_lm", terms, calls)

    assert [(call["temperature"], call["skew"]) for _, call in shared] == options


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({}, 1),
        ({"teacher": answer_of(torch.randn(4, 5, WIDTHS[1]), torch.randn(9, WIDTHS[1]))}, 2),
        ({"weights": {"hard_cross_entropy": 0.2, "soft_target_kl": 1.0, TVD.loss: 1.0}}, 2),
        ({"scale": 0.0}, 2),
    ],
    ids=["alike", "teacher", "weights", "scale"],
)
def test_views_of_one_head_are_scored_in_one_call_unless_of_another_kind(calls, change, count):
    scene = Scene("causal_lm", CE, KL, TVD)
    objective, first = scene.objective, scene.inputs()
    leaves = [torch.randn(4, 5, WIDTHS[0]).requires_grad_() for _ in range(3)]
    all_inputs = [
        replace(first, student=Outputs(hidden=leaf, head=first.student.head), scale=scale)
        for leaf, scale in zip(leaves, (0.5, 0.3, 0.2), strict=True)
    ]
    all_inputs[1] = replace(all_inputs[1], **change)

    together = objective(all_inputs)

    assert len(calls) == count
    total = torch.stack([one.total for one in together]).sum()
    gradients = torch.autograd.grad(total, leaves)
    for one, actual, leaf, gradient in zip(all_inputs, together, leaves, gradients, strict=True):
        (alone,) = objective([replace(one, scale=1.0)])
        (expected,) = torch.autograd.grad(alone.total * one.scale, leaf)
        torch.testing.assert_close(gradient, expected)
        assert one.scale == 0 or actual.sums.keys() == alone.sums.keys()
        for name, value in alone.sums.items():
            torch.testing.assert_close(actual.sums[name].float(), value.float())
    alone_totals = [objective([one])[0].total for one in all_inputs]
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
        answers = Outputs(logits=eye), Outputs(logits=away[[0, 1, 0]])

    result = objective([LossInputs(*answers, batch, objective.weights, ONE_EACH)])[0]

    assert result.sums["top1_agreement"].item() == 1  # the second of both
    unit = "targets" if task == "causal_lm" else "examples"
    assert objective.units["top1_agreement"] == unit


def vectors(part: Tensor) -> Outputs:
    """One layer with one head, whose queries, keys and values are equal."""
    return Outputs(attention=(None, AttentionVectors(part, part, part, part.shape[-1])))


def whole(*lengths: int, **inputs: Any) -> Batch:
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Batch(inputs, torch.zeros(len(lengths)), valid)


def sum_of(group: Any, ours: Outputs, theirs: Outputs, batch: Batch) -> float:
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
    ours, theirs = Outputs(hidden_states=(states,)), Outputs(hidden_states=(states * 0,))

    assert sum_of(group, ours, theirs, Batch({}, torch.zeros(3), valid)) == 2.0**2 + 3.0**2


def test_attention_that_was_not_read_is_an_error_that_names_the_layer():
    term = term_of("attention_mse")
    group = AttentionMatrices(term, ((1, 1),), causal=False)

    with pytest.raises(TypeError, match="attention of layer 1 was not read"):
        sum_of(group, Outputs(attention=(None, None)), vectors(torch.zeros(1, 2, 1)), whole(2))


@pytest.fixture
def flows() -> list[tuple[Tensor, ...]]:
    """The states of two layers of student and teacher, [B, T, D]."""
    drawn = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    return [tuple(state.requires_grad_() for state in of_model) for of_model in drawn]


def flow_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], **options: Any) -> Tensor:
    """The error of the flow through two layers, all positions of which count."""
    lengths = torch.full(student[0].shape[:1], student[0].shape[1])
    (result,) = layer_terms.flow_errors(student, teacher, lengths=lengths, **options)
    return result


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
