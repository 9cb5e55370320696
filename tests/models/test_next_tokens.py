"""The most likely next tokens, and draws of the next token."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import tiny_cuts
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from megakd.contract.batch import MOST_DRAWS, Batch
from megakd.models import generation
from megakd.models.generation import count_draws, draw, drawn, most_likely

ALMOST_ONE = 1 - 2.0**-53


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_cuts.build("llama")


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0))
    return Batch({"input_ids": ids}, ids, torch.ones(3, 5, dtype=torch.bool))


def random_numbers(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_mean_share_of_a_token_is_its_probability():
    logits, tries, draws = torch.tensor([3.0, 1.0, 2.5, -2.0, 0.0, 1.0]), 40_000, 3
    p = logits.double().softmax(-1)

    answer = count_draws(draw(logits.expand(tries, -1), random_numbers(tries, draws)))

    slots = answer.ids.long().clamp(min=0)
    shares = torch.zeros(tries, 6).scatter_add_(1, slots, answer.counts / draws)
    error = (p * (1 - p) / (draws * tries)).sqrt()
    assert ((shares.double().mean(0) - p).abs() <= 4 * error).all()


def test_every_token_of_a_large_vocabulary_has_its_part_of_the_numbers():
    """Sums in fp32 would draw some tokens twice and leave others out."""
    vocabulary = 100_003
    numbers = (torch.arange(vocabulary, dtype=torch.float64) + 0.5) / vocabulary
    answer = draw(torch.zeros(1, vocabulary), numbers[None])
    assert torch.equal(answer[0], torch.arange(vocabulary))


def test_a_token_without_probability_is_never_drawn():
    nothing = -math.inf
    logits = torch.tensor([[nothing, 0.0, nothing, 1.0, nothing], [nothing] * 4 + [0.0]])
    numbers = torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64).expand(2, 2)
    assert draw(logits, numbers).tolist() == [[1, 3], [4, 4]]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_no_token(wrong):
    logits = torch.tensor([[0.0, wrong, 1.0], [0.0, 0.0, 0.0]])
    answer = count_draws(draw(logits, torch.full((2, 4), 0.5, dtype=torch.float64)))
    assert answer.ids.tolist() == [[-1, -1, -1, -1], [1, -1, -1, -1]]
    assert answer.counts.tolist() == [[0, 0, 0, 0], [4, 0, 0, 0]]


tokens = st.lists(st.sampled_from([0, 1, 5, 7, 1 << 18]), min_size=1, max_size=6)


@given(st.lists(tokens, min_size=1, max_size=4), st.integers(1, 3))
def test_counts_are_how_often_each_token_was_drawn(rows, length):
    draws = [(row * 6)[: 2 * length] for row in rows]

    answer = count_draws(torch.tensor(draws))

    for drawn_ids, ids, counts in zip(
        draws, answer.ids.tolist(), answer.counts.tolist(), strict=True
    ):
        kept = {token: count for token, count in zip(ids, counts, strict=True) if token >= 0}
        assert kept == Counter(drawn_ids)
        assert sum(counts) == len(drawn_ids)
        assert [*kept] == sorted(kept)


def test_a_count_of_all_draws_fits():
    assert count_draws(torch.full((1, MOST_DRAWS), 3)).counts[0, 0] == MOST_DRAWS


@pytest.mark.parametrize("at_once", [1, tiny_cuts.VOCABULARY * 4, 1 << 24])
def test_blocks_of_positions_change_neither_tokens_nor_draws(model, batch, monkeypatch, at_once):
    numbers = random_numbers(3, 5, 6)
    monkeypatch.setitem(generation.LOGITS_AT_ONCE, "cpu", at_once)
    logits = model(**batch.inputs).logits.detach()
    expected = count_draws(draw(logits.flatten(0, 1), numbers.flatten(0, 1)))
    best = logits.log_softmax(-1).topk(4)

    with torch.no_grad():
        answer, kept = drawn(model, batch, numbers), most_likely(model, batch, 4)

    assert torch.equal(answer.ids, expected.ids.view(3, 5, 6))
    assert torch.equal(answer.counts, expected.counts.view(3, 5, 6))
    assert torch.equal(kept.ids, best.indices.int())
    torch.testing.assert_close(kept.logprobs, best.values)
