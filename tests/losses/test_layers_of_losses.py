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
from megakd.contract.terms import AttentionMse, EmbeddingMse, HiddenMse, RelationKl
from megakd.contract.unit_counts import unit_weights
from megakd.losses.layer_terms import (
    AttentionMatrices,
    HiddenStates,
    Relations,
    documents,
    visible_keys,
)

LN3 = math.log(3)
ONE_EACH = unit_weights(counts_of(1, 1, 1), 1)
SCORES = AttentionMse(loss="attention_mse")
PROBABILITIES = AttentionMse(loss="attention_mse", fit="probabilities")
KEYS = torch.tensor([[[LN3], [0.0]]])  # [1, 2, 1]: one head of width 1, two tokens
NOTHING = torch.zeros(1, 2, 1)


def vectors(queries: Any, keys: Any = KEYS, values: Any = NOTHING, width: int = 1) -> Knowledge:
    return Knowledge(attention=(None, AttentionVectors(queries, keys, values, width)))


def whole(*lengths: int, **inputs: Any) -> Batch:
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Batch(inputs, torch.zeros(len(lengths)), valid)


def sum_of(group: Any, ours: Knowledge, theirs: Knowledge, batch: Batch) -> float:
    found = group(LossInputs(ours, theirs, batch, {group.name: 1.0}, ONE_EACH))
    assert found.total.item() == pytest.approx(found.sums[group.name].item())
    return found.total.item()


@pytest.mark.parametrize(
    ("term", "causal", "value"),
    [
        # Scores of both queries (ln 3, 0), the teacher's (0, 0).
        (SCORES, False, 2 * LN3**2 / 2),
        (SCORES, True, LN3**2 + LN3**2 / 2),  # the first query sees itself alone
        (PROBABILITIES, False, 2 * (1 / 4) ** 2),  # (3/4, 1/4) and (1/2, 1/2)
        (PROBABILITIES, True, (1 / 4) ** 2),
    ],
    ids=["scores", "causal scores", "probabilities", "causal probabilities"],
)
def test_attention_mse_has_its_hand_value(term, causal, value):
    group = AttentionMatrices(term, ((1, 1),), causal=causal)
    ours, theirs = vectors(torch.ones(1, 2, 1)), vectors(NOTHING)

    assert sum_of(group, ours, theirs, whole(2)) == pytest.approx(value)


def test_attention_mse_is_a_mean_over_heads_whose_scores_have_the_models_scale():
    group = AttentionMatrices(SCORES, ((1, 1),), causal=False)
    ours = vectors(torch.tensor([[[2.0, 0.0, 0.0, 6.0]]]), torch.ones(1, 1, 4), width=2)
    theirs = vectors(torch.zeros(1, 1, 4), torch.ones(1, 1, 4), width=2)

    assert sum_of(group, ours, theirs, whole(1)) == pytest.approx((2**2 / 2 + 6**2 / 2) / 2)


def test_several_heads_of_queries_share_a_head_of_keys_as_the_model_has_it():
    group = AttentionMatrices(SCORES, ((1, 1),), causal=False)
    queries, nothing = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.zeros(1, 1, 4)
    keys = torch.tensor([[[1.0, 10.0]]])  # of the first two heads, of the last two

    found = sum_of(group, vectors(queries, keys), vectors(nothing, keys), whole(1))

    assert found == pytest.approx((1 + 4 + 900 + 1600) / 4)


def relation(ours: Any, theirs: Any, batch: Batch, **options: Any) -> float:
    term = RelationKl(loss="relation_kl", **options)
    group = Relations(term, ((1, 1),), heads=options.get("relation_heads", 1), causal=False)
    return sum_of(group, ours, theirs, batch)


def test_relation_kl_has_its_hand_value():
    root = math.sqrt(LN3)
    told = torch.tensor([[[root], [0.0]]])  # relations (3/4, 1/4) and (1/2, 1/2)
    value = 0.5 * math.log((1 / 2) / (3 / 4)) + 0.5 * math.log((1 / 2) / (1 / 4))
    ours, theirs = vectors(told, told, told), vectors(NOTHING, NOTHING, NOTHING)

    assert relation(ours, theirs, whole(2)) == pytest.approx(value)
    mixed = vectors(told, NOTHING, NOTHING)
    assert relation(mixed, theirs, whole(2)) == pytest.approx(value / 3)
    assert relation(mixed, theirs, whole(2), relations=("query",)) == pytest.approx(value)


def test_relation_kl_of_queries_and_keys_is_the_kl_of_attention_where_the_heads_are_the_models():
    torch.manual_seed(0)
    ours, theirs = (vectors(torch.randn(1, 3, 8), torch.randn(1, 3, 4), width=2) for _ in range(2))
    p, q = (attention(x.attention[1]) for x in (theirs, ours))

    found = relation(ours, theirs, whole(3), relations=("query_key",), relation_heads=4)

    assert found == pytest.approx((p * (p / q).log()).sum().item() / 4)


def attention(of: AttentionVectors) -> torch.Tensor:
    queries, keys = of.queries.unflatten(-1, (-1, 2)), of.keys.unflatten(-1, (-1, 2))
    keys = keys.repeat_interleave(2, dim=2)  # as `repeat_kv` of transformers
    return torch.einsum("btha,bsha->bhts", queries, keys).div(math.sqrt(2)).softmax(-1)


@pytest.mark.parametrize("fit", ["scores", "probabilities", "relation"])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-30, 30, width=32) | st.just(1e4), min_size=12, max_size=12))
def test_a_loss_on_attention_is_finite_and_never_negative(fit, numbers):
    ours, theirs = torch.tensor(numbers).reshape(2, 1, 3, 2)
    both = [vectors(x, x, x, width=2) for x in (ours, theirs)]

    if fit == "relation":
        found = relation(*both, whole(3))
    else:
        term = AttentionMse(loss="attention_mse", fit=fit)
        found = sum_of(AttentionMatrices(term, ((1, 1),), causal=True), *both, whole(3))

    assert math.isfinite(found)
    assert found >= -1e-5


def test_embedding_mse_compares_what_the_embeddings_give_out():
    group = HiddenStates(EmbeddingMse(loss="embedding_mse"), ((0, 0),), (2, 2))
    states = [torch.tensor([[[1.0, 2.0]]]), torch.full((1, 1, 2), 9.0)]
    ours, theirs = (Knowledge(hidden_states=tuple(s * x for s in states)) for x in (1, 3))

    assert sum_of(group, ours, theirs, whole(1)) == pytest.approx((4 + 16) / 2)


def test_the_first_position_is_the_first_that_counts_wherever_padding_is():
    term = HiddenMse(loss="hidden_mse", positions="first", layer_mapping=("0:0",))
    group = HiddenStates(term, ((0, 0),), (1, 1))
    states = torch.tensor([[[1.0], [2.0], [4.0]], [[3.0], [5.0], [7.0]], [[9.0], [9.0], [9.0]]])
    valid = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    ours, theirs = Knowledge(hidden_states=(states,)), Knowledge(hidden_states=(states * 0,))

    assert sum_of(group, ours, theirs, Batch({}, torch.zeros(3), valid)) == 2.0**2 + 3.0**2


def test_a_query_sees_all_keys_that_are_no_padding():
    seen = visible_keys(whole(3, 1), causal=False)

    assert seen.int().tolist() == [[[1, 1, 1]] * 3, [[1, 0, 0], [0, 0, 0], [0, 0, 0]]]


def test_a_causal_query_sees_the_keys_before_it_in_its_own_document():
    batch = whole(4, position_ids=torch.tensor([[3, 4, 0, 1]]))

    seen = visible_keys(batch, causal=True)

    assert seen.int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]


@pytest.mark.parametrize(
    ("positions", "numbers"),
    [
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([5, 6, 0, 1], [0, 0, 1, 1]),
        ([0, 0, 0, 1], [0, 1, 2, 2]),  # documents of one token
    ],
)
def test_documents_are_told_apart_by_restarting_positions(positions, numbers):
    assert documents(whole(4, position_ids=torch.tensor([positions]))).tolist() == [numbers]


def test_a_batch_without_positions_has_no_documents_to_tell_apart():
    assert documents(whole(2)) is None


def test_attention_that_was_not_read_is_an_error_that_names_the_layer():
    group = AttentionMatrices(SCORES, ((1, 1),), causal=False)

    with pytest.raises(TypeError, match="attention of layer 1 was not read"):
        sum_of(group, Knowledge(attention=(None, None)), vectors(NOTHING), whole(2))
