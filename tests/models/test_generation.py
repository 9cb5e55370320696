"""Completions, where they end, and rows that leave the batch; likely tokens and draws of tokens."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_cuts
import torch
from elastic_views import VOCABULARY, WITHOUT, family_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from megakd.config.sections import MOST_DRAWS, Sampling
from megakd.data.batch import Batch
from megakd.errors import DataError, ModelError
from megakd.models import generation
from megakd.models.draws import LOGITS_AT_ONCE, count_draws, draw, drawn, most_likely
from megakd.models.elastic import Elastic
from megakd.models.end_tokens import TextTokens, generation_file, text_tokens
from megakd.models.generation import check_prompt_lengths, complete, context_length
from megakd.models.packing import VARLEN, register_packed_attention
from megakd.models.views import Cut, View

PROMPTS = [[5, 6, 7], [8], [1, 2, 3, 4, 5, 6, 1], [9, 9, 9], [60, 50, 40, 30]]
SEEDS = [11, 12, 13, 2**63 + 1, -14]
GREEDY = Sampling(8, temperature=0)
SAMPLED = Sampling(8)
OPTIONS = {"tokens": TextTokens(frozenset(), pad=1), "rows_at_once": 8}


def with_defaults(model, sampling=SAMPLED, *, prompts=PROMPTS, seeds=SEEDS, **options):
    return complete(model, prompts, seeds, sampling, **{**OPTIONS, **options})


def texts(model, sampling=SAMPLED, **options):
    return [completion.ids for completion in with_defaults(model, sampling, **options)]


@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(12, temperature=0.0)])
def test_tokens_that_the_tokenizer_does_not_have_are_never_generated(sampling):
    model = family_model("llama")
    assert max(map(max, texts(model, sampling))) >= 20
    result = texts(model, sampling, tokens=TextTokens(frozenset(), pad=1, known=20))
    assert max(map(max, result)) < 20


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[3], []], "prompt 1 has no tokens"),
        ([[3], [3] * 9], r"prompt 1 has 9 tokens.*16 tokens.* 8 leave 8 tokens"),
    ],
)
def test_prompts_without_tokens_or_room_are_refused(prompts, message):
    model = family_model("gpt2", n_positions=16)

    assert context_length(CONFIG_MAPPING["bloom"]()) is None  # which takes prompts of any length
    check_prompt_lengths([10**9], 10, None)
    assert with_defaults(model, prompts=[], seeds=[]) == []
    assert len(texts(model, prompts=[[3] * 8], seeds=[0])[0]) == 8
    with pytest.raises(DataError, match=message):
        with_defaults(model, prompts=prompts, seeds=[0, 0])
    with pytest.raises(ModelError, match="DistilBertForSequenceClassification cannot generate"):
        with_defaults(family_model("distilbert"))


def test_the_models_own_generation_config_changes_nothing_and_is_kept():
    model = family_model("llama")
    expected = texts(model, GREEDY)
    given = model.generation_config
    given.update(repetition_penalty=50.0, eos_token_id=expected[0][1], bad_words_ids=[[7]])
    before = given.to_dict()

    assert texts(model, GREEDY) == expected
    assert model.generation_config is given
    assert given.to_dict() == before


def test_training_goes_on_as_if_nothing_had_been_generated():
    model = family_model("gpt2", use_cache=False)  # with dropout
    expected = texts(model)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.transformer.h[1].eval()
    states = [random.getstate(), torch.get_rng_state(), np.random.get_state()[1]]  # noqa: NPY002
    modes = {name: part.training for name, part in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())

    assert texts(model) == expected

    assert {name: part.training for name, part in model.named_modules()} == modes
    assert model.config.to_dict() == config
    assert model.is_activation_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


def test_a_model_with_the_attention_of_packed_rows_keeps_it_also_after_a_failure(monkeypatch):
    register_packed_attention()
    model = family_model("llama")
    expected = texts(model)
    model.train().set_attn_implementation(VARLEN)
    given = model.generation_config

    assert texts(model) == expected
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        with_defaults(model)

    assert model.generation_config is given
    assert model.config._attn_implementation == VARLEN
    assert all(part.training for part in model.modules())


def test_a_family_that_transformers_runs_without_sdpa_generates_between_packed_rows():
    register_packed_attention()
    keys = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    keys |= {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_logit_softcapping": None}
    model = AutoModelForCausalLM.from_config(Gemma2Config(vocab_size=VOCABULARY, **keys))
    expected = texts(model)

    model.set_attn_implementation(VARLEN)

    assert texts(model) == expected


def test_a_number_that_a_tokenizer_skips_leaves_its_last_token_known():
    table = {"a": 0, "b": 1, "<end>": 6}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(table, unk_token="a")),  # noqa: S106
        eos_token="<end>",  # noqa: S106
    )
    source: Any = SimpleNamespace(config=LlamaConfig(vocab_size=9, eos_token_id=6), folder=None)

    tokens = text_tokens(tokenizer, {"student": source})

    assert (tokens.end, tokens.known) == ({6}, 7)


@pytest.mark.parametrize(
    ("listed", "of_tokenizer", "answers_end", "kept"),
    [
        ([9, 2], 2, (), [9, 2]),
        ([9], 2, (), [2, 9]),
        ([9, 40], 2, (), [2, 9]),  # 40 is an ordinary token
        (7, 2, (), [2]),
        # Learned answers end with a token of their own.
        (2, 2, (5,), [2, 5]),
        ([2, 9], 2, (5,), [2, 5, 9]),
        (5, 5, (5,), 5),
        (None, 2, (5,), [2, 5]),  # a student from scratch has no file
    ],
)
def test_a_generation_config_keeps_its_end_tokens_beside_those_of_the_tokenizer_and_the_answers(
    tmp_path, listed, of_tokenizer, answers_end, kept
):
    tokenizer: Any = SimpleNamespace(
        eos_token_id=of_tokenizer, bos_token_id=None, pad_token_id=0,
        added_tokens_decoder={2: "", 5: "", 9: ""},
    )  # fmt: skip
    stored = {"eos_token_id": listed, "temperature": 0.6, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    folder = None if listed is None else tmp_path
    source: Any = SimpleNamespace(folder=folder, where="student.model", config=LlamaConfig())

    (text,) = generation_file(source, tokenizer, frozenset(answers_end)).values()

    settings = GenerationConfig.from_dict(json.loads(text))
    assert (settings.eos_token_id, settings.pad_token_id) == (kept, 0)
    assert settings.temperature == (GenerationConfig().temperature if listed is None else 0.6)


MAMBA = {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}
HYBRID = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
HYBRID |= {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_layer_indices": [1]}
HYBRID |= {"intermediate_size": 32}
SIXTEEN = [[5 + row, 6, 7][: 1 + row % 3] for row in range(16)]
CASE = settings(max_examples=3, deadline=None, suppress_health_check=[*HealthCheck])


@cache
def model_of(kind: str):
    """A tiny model in fp64, where rounding decides nothing."""
    if kind == "elastic":
        Elastic(model := family_model("llama", tie_word_embeddings=False)).keep(Cut(None, WITHOUT))
        return model
    if kind == "cut llama":
        return family_model("llama", kept=View((0, 2, 3), (7, 0, 33)))
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


def with_ends(model, prompts, ends, sampling, *, rows_at_once=64, pad=1):
    seeds = [7 * row - 3 for row in range(len(prompts))]
    tokens = TextTokens(frozenset(ends), pad)
    return complete(model, prompts, seeds, sampling, tokens=tokens, rows_at_once=rows_at_once)


def without_batch(model, prompts, ends, limit):
    """The greedy texts from whole forwards of single rows, without `generate` and a cache."""
    collected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        while ids.shape[1] < len(prompt) + limit:
            with torch.no_grad():
                scores = model(ids, use_cache=False).logits[:, -1].float()
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
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


KINDS = ["llama", "mistral", "gpt2", "cut llama", "elastic", "mamba2", "bamba"]


@pytest.mark.parametrize("kind", KINDS)
@CASE
@given(
    prompts=st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=9), min_size=1, max_size=9),
    ends=st.frozensets(st.integers(0, 59), max_size=30),
    limit=st.integers(1, 12),
    rows_at_once=st.integers(1, 9),
    share=st.sampled_from([0.01, 0.125, 0.5, 1.0]),
    pad=st.integers(0, 59),  # a token of the texts, or an end
)
def test_greedy_texts_are_those_of_single_rows(
    kind, prompts, ends, limit, rows_at_once, share, pad
):
    model, sampling = model_of(kind), Sampling(limit, temperature=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "SHARE_TO_LEAVE", share)
        result = with_ends(model, prompts, ends, sampling, rows_at_once=rows_at_once, pad=pad)

    assert [text.ids for text in result] == without_batch(model, prompts, ends, limit)
    assert [text.finished for text in result] == [text.ids[-1] in ends for text in result]


@CASE
@given(ends=st.frozensets(st.integers(0, 59), min_size=2, max_size=20), count=st.integers(1, 40))
def test_few_rows_that_have_ended_are_computed(ends, count):
    model, prompts = model_of("llama"), (SIXTEEN * 3)[:count]

    with forwards(model) as shapes:
        result = with_ends(model, prompts, ends, Sampling(24))

    lengths = [len(text.ids) for text in result]
    assert len(shapes) == max(lengths)
    for step, (rows, _) in enumerate(shapes):
        running = sum(length > step for length in lengths)
        assert running <= rows
        assert rows - running < generation.SHARE_TO_LEAVE * rows


@pytest.mark.parametrize("kind", ["llama", "mistral", "cut llama", "bamba"])
def test_rows_that_go_on_are_not_read_again(kind):
    model = model_of(kind)

    with forwards(model) as shapes:
        with_ends(model, SIXTEEN, range(20), Sampling(24))

    assert len({rows for rows, _ in shapes}) > 1, "no row has left the batch"
    assert shapes[0] == (len(SIXTEEN), 3)
    assert {length for _, length in shapes[1:]} == {1}


ROWS = 6000


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1), VOCABULARY),
        (Sampling(1, temperature=0.5), VOCABULARY),
        (Sampling(1, top_k=3), 3),
        (Sampling(1, temperature=2.0, top_k=1), 1),
        (Sampling(1, top_p=0.001), 1),
    ],
    ids=str,
)
def test_sampled_tokens_follow_the_softmax_over_those_that_are_kept(sampling, kept):
    model, prompt = family_model("llama"), [5, 6, 7]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    probabilities = (logits / sampling.temperature).softmax(-1).numpy()
    best, rest = np.split(np.argsort(-probabilities), [kept])

    result = texts(
        model, sampling, prompts=[prompt] * ROWS, seeds=range(3, ROWS + 3), rows_at_once=ROWS // 2
    )

    counts = np.bincount([token for (token,) in result], minlength=VOCABULARY)
    assert counts[rest].sum() == 0
    expected = ROWS * probabilities[best] / probabilities[best].sum()
    assert kept == 1 or stats.chisquare(counts[best], expected).pvalue > 1e-3


def test_texts_follow_from_their_seeds():
    model, others = family_model("llama"), [seed + 1 for seed in SEEDS]
    assert texts(model) == texts(model) != texts(model, seeds=others)


# The most likely next tokens, and draws of the next token.


ALMOST_ONE = 1 - 2.0**-53


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
    assert count_draws(torch.full((1, MOST_DRAWS), 3)).counts[0, 0] == MOST_DRAWS


@pytest.mark.parametrize("at_once", [1, tiny_cuts.VOCABULARY * 4, 1 << 24])
def test_blocks_of_positions_change_neither_tokens_nor_draws(monkeypatch, at_once):
    model, numbers = tiny_cuts.build("llama"), random_numbers(3, 5, 6)
    ids = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0))
    batch = Batch({"input_ids": ids}, ids, torch.ones(3, 5, dtype=torch.bool))
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", at_once)
    logits = model(**batch.inputs).logits.detach()
    expected = count_draws(draw(logits.flatten(0, 1), numbers.flatten(0, 1)))
    best = logits.log_softmax(-1).topk(4)

    with torch.no_grad():
        answer, kept = drawn(model, batch, numbers), most_likely(model, batch, 4)

    assert torch.equal(answer.ids, expected.ids.view(3, 5, 6))
    assert torch.equal(answer.counts, expected.counts.view(3, 5, 6))
    assert torch.equal(kept.ids, best.indices.int())
    torch.testing.assert_close(kept.logprobs, best.values)
