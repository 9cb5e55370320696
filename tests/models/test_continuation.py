"""Rows that have ended leave the batch, the texts stay the same, and the noise of sampling."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from elastic_views import VOCABULARY, WITHOUT, family_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megakd.contract.completions import Sampling, TextTokens
from megakd.contract.views import Cut
from megakd.models import generation
from megakd.models.elastic import Elastic
from megakd.models.generation import GumbelNoise, _gumbel, complete, sampling_processors

CUT = {"head_counts": [0, 2, 3], "neuron_counts": [7, 0, 33], "head_width": 8}
MAMBA = {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}
HYBRID = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
HYBRID |= {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_layer_indices": [1]}
HYBRID |= {"intermediate_size": 32}
PROMPTS = [[5 + row, 6, 7][: 1 + row % 3] for row in range(16)]
CASE = settings(max_examples=4, deadline=None, suppress_health_check=[*HealthCheck])


@cache
def model_of(kind: str):
    """A tiny model in fp64, where rounding decides nothing."""
    if kind == "elastic":
        Elastic(model := family_model("llama", tie_word_embeddings=False)).keep(Cut(None, WITHOUT))
        return model
    if kind == "cut_llama":
        return family_model(kind, **CUT)
    if kind == "mistral":
        return family_model(kind, sliding_window=4)
    if kind in ("mamba2", "bamba"):
        return stateful(kind, MAMBA if kind == "mamba2" else HYBRID)
    return family_model(kind)


def stateful(kind: str, keys: dict):
    """A model with recurrent states: of all layers, or beside an attention."""
    keys = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, **keys}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**keys)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def completed(model, prompts, ends, sampling, *, rows_at_once=64, pad=1):
    seeds = [7 * row - 3 for row in range(len(prompts))]
    tokens = TextTokens(frozenset(ends), pad)
    return complete(model, prompts, seeds, sampling, tokens=tokens, rows_at_once=rows_at_once)


def without_batch(model, prompts, ends, sampling):
    """The texts from whole forwards of single rows, without `generate` and without a cache."""
    collected = []
    for row, prompt in enumerate(prompts):
        process = sampling_processors(sampling, [7 * row - 3], len(prompt), torch.device("cpu"))
        ids = torch.tensor([prompt])
        while ids.shape[1] < len(prompt) + sampling.max_new_tokens:
            with torch.no_grad():
                scores = model(ids, use_cache=False).logits[:, -1].float()
            ids = torch.cat([ids, process(ids, scores).argmax(-1, keepdim=True)], 1)
            if int(ids[0, -1]) in ends:
                break
        collected.append(tuple(ids[0, len(prompt) :].tolist()))
    return collected


@contextmanager
def forwards(model):
    """The shapes [B, T] of the tokens of each forward."""
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


KINDS = ["llama", "mistral", "gpt2", "cut_llama", "elastic", "mamba2", "bamba"]


@pytest.mark.parametrize("kind", KINDS)
@CASE
@given(
    prompts=st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=9), min_size=1, max_size=9),
    ends=st.frozensets(st.integers(0, 59), max_size=30),
    limit=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    rows_at_once=st.integers(1, 9),
    share=st.sampled_from([0.01, 0.125, 0.5, 1.0]),
    top_k=st.sampled_from([None, 5]),
)
def test_texts_are_those_of_single_rows(
    kind, prompts, ends, limit, temperature, rows_at_once, share, top_k
):
    model, sampling = model_of(kind), Sampling(limit, temperature, top_k=top_k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "SHARE_TO_LEAVE", share)
        result = completed(model, prompts, ends, sampling, rows_at_once=rows_at_once)

    assert [text.ids for text in result] == without_batch(model, prompts, ends, sampling)
    assert [text.finished for text in result] == [text.ids[-1] in ends for text in result]


@CASE
@given(ends=st.frozensets(st.integers(0, 59), max_size=30), pad=st.integers(0, 59))
def test_the_padding_may_be_a_token_of_the_texts_or_an_end(ends, pad):
    model, sampling = model_of("llama"), Sampling(10)
    result = completed(model, PROMPTS, ends, sampling, pad=pad)
    assert [text.ids for text in result] == without_batch(model, PROMPTS, ends, sampling)


@CASE
@given(ends=st.frozensets(st.integers(0, 59), min_size=2, max_size=20), count=st.integers(1, 40))
def test_few_rows_that_have_ended_are_computed(ends, count):
    model, prompts = model_of("llama"), (PROMPTS * 3)[:count]

    with forwards(model) as shapes:
        result = completed(model, prompts, ends, Sampling(24))

    lengths = [len(text.ids) for text in result]
    assert len(shapes) == max(lengths)
    for step, (rows, _) in enumerate(shapes):
        running = sum(length > step for length in lengths)
        assert running <= rows
        assert rows - running < generation.SHARE_TO_LEAVE * rows


def test_rows_that_end_at_different_tokens_are_counted_together():
    enough = generation.EnoughHaveEnded(torch.tensor([7]), rows=16)
    one, another = torch.zeros(2, 16, 1, dtype=torch.long).unbind()
    one[3], another[5] = 7, 7
    assert enough(one, None).tolist() == [False] * 16
    assert enough(another, None).tolist() == [True] * 16


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "cut_llama", "elastic", "bamba"])
def test_rows_that_go_on_are_not_read_again(kind):
    model = model_of(kind)

    with forwards(model) as shapes:
        completed(model, PROMPTS, range(20), Sampling(24))

    assert len({rows for rows, _ in shapes}) > 1, "no row has left the batch"
    assert shapes[0] == (len(PROMPTS), 3)
    assert {length for _, length in shapes[1:]} == {1}


def test_rows_that_all_reach_the_limit_are_one_call_of_generate(monkeypatch):
    model, calls = model_of("llama"), []
    real = type(model).generate
    monkeypatch.setattr(
        model, "generate", lambda *given, **keys: calls.append(1) or real(model, *given, **keys)
    )

    completed(model, PROMPTS, [], Sampling(8))

    assert len(calls) == 1


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
