"""Completions: what they depend on, where they end, and what they leave as it was."""

from __future__ import annotations

import copy
import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from elastic_views import NARROW, UNEVEN, VOCABULARY, WITHOUT, cut, family_model, masked
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

from megakd.contract.completions import Sampling, TextTokens
from megakd.contract.views import Cut
from megakd.errors import DataError, ModelError
from megakd.models.elastic import Elastic
from megakd.models.generation import check_prompt_lengths, complete, context_length, generation_file
from megakd.models.packed_attention import VARLEN, register_packed_attention
from megakd.rollouts.generators import text_tokens

PROMPTS = [[5, 6, 7], [8], [1, 2, 3, 4, 5, 6, 1], [9, 9, 9], [60, 50, 40, 30]]
SEEDS = [11, 12, 13, 2**63 + 1, -14]
GREEDY = Sampling(8, temperature=0)
SAMPLED = Sampling(8)
OPTIONS = {"tokens": TextTokens(frozenset(), pad=1), "rows_at_once": 8}


def completed(model, sampling=SAMPLED, *, prompts=PROMPTS, seeds=SEEDS, **options):
    return complete(model, prompts, seeds, sampling, **{**OPTIONS, **options})


def texts(model, sampling=SAMPLED, **options):
    return [completion.ids for completion in completed(model, sampling, **options)]


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

    assert completed(model, prompts=[], seeds=[]) == []
    assert len(texts(model, prompts=[[3] * 8], seeds=[0])[0]) == 8
    with pytest.raises(DataError, match=message):
        completed(model, prompts=prompts, seeds=[0, 0])
    with pytest.raises(ModelError, match="DistilBertForSequenceClassification cannot generate"):
        completed(family_model("distilbert"))


def test_a_model_without_a_limit_takes_prompts_of_any_length():
    assert context_length(CONFIG_MAPPING["bloom"]()) is None
    check_prompt_lengths([10**9], 10, None)


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
        completed(model)

    assert model.generation_config is given
    assert model.config._attn_implementation == VARLEN
    assert all(part.training for part in model.modules())


def test_a_family_that_transformers_runs_without_sdpa_generates_between_packed_rows():
    register_packed_attention()
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, attn_logit_softcapping=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    expected = texts(model)

    model.set_attn_implementation(VARLEN)

    assert texts(model) == expected


@pytest.mark.parametrize(
    ("family", "view", "dense"),
    [
        ("llama", UNEVEN, masked),
        ("qwen3", WITHOUT, masked),
        ("gpt2", WITHOUT, masked),
        ("gpt2", NARROW, cut),
    ],
    ids=["uneven", "without", "gpt2", "narrow"],
)
def test_an_elastic_model_generates_as_the_model_that_it_runs_as(family, view, dense):
    model = family_model(family, tie_word_embeddings=False)
    whole, expected = texts(model), texts(dense(model, view))
    elastic = Elastic(model)

    elastic.keep(Cut(None, view))
    assert texts(model) == expected != whole

    elastic.keep(None)
    assert texts(model) == whole


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
    ("listed", "kept"),
    [([9, 2], [9, 2]), ([9], [2, 9]), ([9, 40], [2, 9]), (7, [2])],
    ids=["has it", "added token", "ordinary token", "only an ordinary token"],
)
def test_a_generation_config_keeps_its_end_tokens_beside_that_of_the_tokenizer(
    tmp_path, listed, kept
):
    tokenizer = SimpleNamespace(
        eos_token_id=2, bos_token_id=None, pad_token_id=0, added_tokens_decoder={2: "", 9: ""}
    )
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": listed, "temperature": 0.6, "do_sample": True})
    )
    source: Any = SimpleNamespace(folder=tmp_path, where="student.model")

    (text,) = generation_file(source, tokenizer).values()

    settings = GenerationConfig.from_dict(json.loads(text))
    assert settings.eos_token_id == kept
    assert (settings.temperature, settings.pad_token_id) == (0.6, 0)
    assert generation_file(SimpleNamespace(folder=None), tokenizer) == {}
