"""The noise behind sampling: its numbers, its distribution, and its independence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from megakd.contract.completions import Sampling
from megakd.models.generation import GumbelNoise, _gumbel, sampling_processors

LOGITS = torch.tensor([2.0, 0.5, -1.0, 1.0, 0.0, -0.5, 1.5, -3.0])
CPU = torch.device("cpu")
DRAWS = 20_000
GOLDEN = 0x9E3779B97F4A7C15


def sampled(seeds, position: int = 0, sampling: Sampling | None = None) -> np.ndarray:
    """The tokens of rows that all have the same logits, one row per seed."""
    processors = sampling_processors(sampling or Sampling(1), list(seeds), 3, CPU)
    ids = torch.zeros(len(seeds), 3 + position, dtype=torch.long)
    return processors(ids, LOGITS.repeat(len(seeds), 1)).argmax(-1).numpy()


def mixed(state: int) -> int:
    """SplitMix64's output function, with Python's integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


@given(
    seed=st.integers(-(2**63), 2**64 - 1), position=st.integers(0, 2**20), token=st.integers(0, 7)
)
def test_the_noise_is_made_of_splitmix64_of_seed_position_and_token(seed, position, token):
    key = mixed((mixed((seed + GOLDEN) % 2**64) + (position + 1) * GOLDEN) % 2**64)
    uniform = ((mixed((key + (token + 1) * GOLDEN) % 2**64) >> 12) + 0.5) * 2.0**-52
    expected = -math.log(-math.log1p(-uniform))
    ids = torch.zeros(1, 1).expand(1, 2 + position)

    noise = GumbelNoise([seed], 2, CPU)(ids, torch.zeros(1, 8))

    assert noise[0, token].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_noise_is_finite_for_all_bits():
    bits = torch.tensor([0, 1, -1, -2, 2**63 - 1, -(2**63)])
    noise = _gumbel(bits)
    assert noise.isfinite().all()
    assert noise.max() > 30


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 0), (0, 1)), ((0, 1), (1, 0)), ((0, 0), (2**32, 0))],
    ids=["next position", "next seed, position before", "seed with other high bits"],
)
def test_tokens_of_two_positions_or_seeds_are_independent(first, second):
    pairs = [
        sampled(range(offset, offset + DRAWS), position) for offset, position in (first, second)
    ]
    table = np.zeros((len(LOGITS), len(LOGITS)))
    np.add.at(table, tuple(pairs), 1)
    seen = table[table.sum(1) > 100][:, table.sum(0) > 100]

    assert stats.chi2_contingency(seen).pvalue > 1e-3


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1), 8),
        (Sampling(1, temperature=2.0), 8),
        (Sampling(1, top_k=3), 3),
        (Sampling(1, top_p=0.8), 4),
        # The temperature comes first: then the most likely token alone has the probability.
        (Sampling(1, temperature=0.1, top_p=0.9), 1),
    ],
    ids=str,
)
def test_tokens_over_seeds_follow_the_softmax_over_those_that_are_kept(sampling, kept):
    probabilities = (LOGITS / sampling.temperature).double().softmax(-1).numpy()
    best, rest = np.split(np.argsort(-probabilities), [kept])

    counts = np.bincount(sampled(range(DRAWS), sampling=sampling), minlength=len(LOGITS))

    assert counts[rest].sum() == 0
    expected = DRAWS * probabilities[best] / probabilities[best].sum()
    assert kept == 1 or stats.chisquare(counts[best], expected).pvalue > 1e-3


def test_a_seed_gives_the_same_tokens_in_every_row():
    alone = sampled([7])
    among_others = sampled([3, 7, 2**63 + 5, -1, 7])
    assert among_others[1] == among_others[4] == alone[0]
