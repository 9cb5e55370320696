"""Losses on attention, hidden states and FSP matrices: hand values and what may not matter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_terms import term_of
from torch import Tensor
from unit_counts import counts_of

from megakd.contract.batch import AttentionVectors, Batch, Knowledge, LossInputs
from megakd.losses import layer_terms
from megakd.losses.bundle import unit_scales
from megakd.losses.layer_terms import (
    AttentionMatrices,
    HiddenStates,
    Relations,
    flow_errors,
    visible_keys,
)

ONE_EACH = unit_scales(counts_of(1, 1, 1), 1).weights


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
@settings(max_examples=20, deadline=None)
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

    result = visible_keys(batch, causal=True)[0].int().tolist()

    assert ["".join(map(str, row)) for row in result] == seen


def test_attention_that_was_not_read_is_an_error_that_names_the_layer():
    term = term_of("attention_mse")
    group = AttentionMatrices(term, ((1, 1),), causal=False)

    with pytest.raises(TypeError, match="attention of layer 1 was not read"):
        sum_of(group, Knowledge(attention=(None, None)), vectors(torch.zeros(1, 2, 1)), whole(2))


def states(*, seed: int) -> tuple[Tensor, ...]:
    """The states of two layers, [B, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    return tuple(state.requires_grad_() for state in drawn)


def flow_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], **options: Any) -> Tensor:
    """The error of the flow through two layers, all positions of which count."""
    valid = torch.ones(student[0].shape[:2], dtype=torch.bool)
    (result,) = flow_errors(student, teacher, valid=valid, **options)
    return result


def test_a_text_said_twice_flows_as_it_does_once():
    student, teacher = states(seed=0), states(seed=1)
    twice = [tuple(torch.cat([state] * 2, 1) for state in flow) for flow in (student, teacher)]

    torch.testing.assert_close(flow_error(*twice), flow_error(student, teacher))


@pytest.mark.parametrize("elements", [1, 50, 60])
def test_flow_matrices_of_a_few_rows_at_a_time_give_the_same(monkeypatch, elements):
    student, teacher = states(seed=0), states(seed=1)
    whole = flow_error(student, teacher)
    wanted = torch.autograd.grad(whole, student)

    monkeypatch.setattr(layer_terms, "MATRIX_ELEMENTS", elements)
    actual = flow_error(student, teacher)

    torch.testing.assert_close(actual, whole)
    torch.testing.assert_close(torch.autograd.grad(actual, student), wanted)


def test_a_second_derivative_is_refused_and_the_reference_has_it():
    student, teacher = states(seed=0), states(seed=1)
    result = flow_error(student, teacher)
    reference = flow_error(student, teacher, kernels="reference")

    with pytest.raises(RuntimeError, match="do not support second derivatives"):
        torch.autograd.grad(result, student[0], create_graph=True)
    (slope,) = torch.autograd.grad(reference, student[0], create_graph=True)
    assert torch.autograd.grad(slope.sum(), student[1])[0].any()
