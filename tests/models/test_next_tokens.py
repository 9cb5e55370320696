"""The most likely next tokens, draws of the next token, and the end of a model by itself."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import tiny_cuts
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from megakd.contract.batch import MOST_DRAWS, Batch
from megakd.errors import ModelError
from megakd.models import next_tokens, weights
from megakd.models.architectures import FAMILIES, architecture_of
from megakd.models.next_tokens import count_draws, draw, drawn, load_readout, most_likely

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
    monkeypatch.setitem(next_tokens.LOGITS_AT_ONCE, "cpu", at_once)
    logits = model(**batch.inputs).logits.detach()
    expected = count_draws(draw(logits.flatten(0, 1), numbers.flatten(0, 1)))
    best = logits.log_softmax(-1).topk(4)

    with torch.no_grad():
        answer, kept = drawn(model, batch, numbers), most_likely(model, batch, 4)

    assert torch.equal(answer.ids, expected.ids.view(3, 5, 6))
    assert torch.equal(answer.counts, expected.counts.view(3, 5, 6))
    assert torch.equal(kept.ids, best.indices.int())
    torch.testing.assert_close(kept.logprobs, best.values)


DECODERS = [name for name, entry in FAMILIES.items() if "causal_lm" in entry.tasks]


def last_states(model, ids):
    """The output of the last layer [B, T, D], before any norm, and the logits of the model."""
    caught = []
    architecture = architecture_of(model.config)
    block = architecture.block_of(model, architecture.number_of_layers(model.config))

    def catch(_module, _arguments, output):
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(catch)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    handle.remove()
    return caught[0], logits


def both(tiny, family, dtype=torch.float32, **keys):
    folder, task = tiny.save(family, **keys), tiny.task("causal_lm")
    source = tiny.resolve(folder, task)
    return tiny.load(source, task, dtype=dtype), load_readout(source, task, dtype)


@pytest.mark.parametrize(
    ("family", "tied"), [*((family, False) for family in DECODERS), ("llama", True)]
)
def test_the_logits_are_those_of_the_model(tiny, family, tied):
    model, readout = both(tiny, family, tie_word_embeddings=tied)
    states, logits = last_states(model, tiny.input_ids)

    actual = readout.logprobs(states.flatten(0, 1))

    wanted = logits.flatten(0, 1).log_softmax(-1)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    # A family whose norm changes nothing would pass without the norm.
    weight, bias = readout.head.read()
    without = readout.head.warp(torch.nn.functional.linear(states.flatten(0, 1), weight, bias))
    assert (without.log_softmax(-1) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_in_16_bits_the_input_of_the_head_is_that_of_the_model_bit_for_bit(tiny, family):
    model, readout = both(tiny, family, torch.bfloat16)
    states, _ = last_states(model, tiny.input_ids)
    with torch.no_grad():
        backbone = architecture_of(model.config).backbone_of(model)
        wanted = backbone(input_ids=tiny.input_ids, use_cache=False).last_hidden_state

    assert torch.equal(readout(states), wanted)
    assert readout.weight.dtype == torch.bfloat16


def test_many_positions_give_the_tokens_of_few(tiny, monkeypatch):
    model, readout = both(tiny, "llama")
    states = last_states(model, tiny.input_ids)[0].flatten(0, 1)
    values, tokens = readout.most_likely(states, 5)
    monkeypatch.setattr("megakd.models.next_tokens._POSITIONS", 5)

    again = readout.most_likely(states, 5)

    assert torch.equal(tokens, again[1])
    torch.testing.assert_close(values, again[0])
    assert torch.equal(tokens[:, 0], readout.logprobs(states).argmax(-1))


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_norm_and_the_head_are_read_also_from_shards(tiny, monkeypatch, tied):
    folder, task = tiny.save("llama", tie_word_embeddings=tied), tiny.task("causal_lm")
    whole = load_readout(tiny.resolve(folder, task), task, torch.float32)
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{number:05d}.safetensors" for number, name in enumerate(stored)}
    for name, file in names.items():
        save_file({name: stored[name]}, folder / file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read = []
    read_one = weights.WeightReader.read
    monkeypatch.setattr(
        weights.WeightReader,
        "read",
        lambda self, one: (read.append(one.key), read_one(self, one))[1],
    )

    result = load_readout(tiny.resolve(folder, task), task, torch.float32)

    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert read == ["model.norm.weight", head]
    for name, value in whole.state_dict().items():
        assert torch.equal(result.state_dict()[name], value), name


def test_a_head_that_is_not_in_the_files_is_named(tiny):
    folder, task = tiny.save("llama", tie_word_embeddings=False), tiny.task("causal_lm")
    tiny.rewrite(lambda t: {name: t[name] for name in t if name != "lm_head.weight"})

    with pytest.raises(ModelError, match=r"has no tensor lm_head\.weight, which the logits"):
        load_readout(tiny.resolve(folder, task), task, torch.float32)
