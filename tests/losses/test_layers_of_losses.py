"""Hand values of the losses on attention, and which keys a query sees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_counts import counts_of

from megakd.contract.batch import AttentionVectors, Batch, Knowledge, LossInputs
from megakd.contract.terms import AttentionMse, HiddenMse, RelationKl
from megakd.losses.bundle import unit_scales
from megakd.losses.layer_terms import (
    AttentionMatrices,
    HiddenStates,
    Relations,
    visible_keys,
)

LN3 = math.log(3)
ONE_EACH = unit_scales(counts_of(1, 1, 1), 1).weights
SCORES = AttentionMse(loss="attention_mse")
KEYS = torch.tensor([[[LN3], [0.0]]])  # [1, 2, 1]: one head of width 1, two tokens
NOTHING = torch.zeros(1, 2, 1)


def vectors(queries: Any, keys: Any = KEYS, values: Any = NOTHING, width: int = 1) -> Knowledge:
    return Knowledge(attention=(None, AttentionVectors(queries, keys, values, width)))


def whole(*lengths: int, **inputs: Any) -> Batch:
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Batch(inputs, torch.zeros(len(lengths)), valid)


def sum_of(group: Any, ours: Knowledge, theirs: Knowledge, batch: Batch) -> float:
    (name,) = group.units
    result = group(LossInputs(ours, theirs, batch, {name: 1.0}, ONE_EACH))
    assert result.total.item() == pytest.approx(result.sums[name].item())
    return result.total.item()


def relation(ours: Any, theirs: Any, batch: Batch, **options: Any) -> float:
    term = RelationKl(loss="relation_kl", **options)
    group = Relations(term, ((1, 1),), heads=options.get("relation_heads", 1), causal=False)
    return sum_of(group, ours, theirs, batch)


@pytest.mark.parametrize("fit", ["scores", "probabilities", "relation"])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-30, 30, width=32) | st.just(1e4), min_size=12, max_size=12))
def test_a_loss_on_attention_is_finite_and_never_negative(fit, numbers):
    ours, theirs = torch.tensor(numbers).reshape(2, 1, 3, 2)
    both = [vectors(x, x, x, width=2) for x in (ours, theirs)]

    if fit == "relation":
        result = relation(*both, whole(3))
    else:
        term = AttentionMse(loss="attention_mse", fit=fit)
        result = sum_of(AttentionMatrices(term, ((1, 1),), causal=True), *both, whole(3))

    assert math.isfinite(result)
    assert result >= -1e-5


def test_the_first_position_is_the_first_that_counts_wherever_padding_is():
    term = HiddenMse(loss="hidden_mse", positions="first", layer_mapping=("0:0",))
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
    group = AttentionMatrices(SCORES, ((1, 1),), causal=False)

    with pytest.raises(TypeError, match="attention of layer 1 was not read"):
        sum_of(group, Knowledge(attention=(None, None)), vectors(NOTHING), whole(2))
