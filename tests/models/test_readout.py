"""The end of a model by itself: its logits for the states of the last layer are the model's own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.errors import ModelError
from megakd.models import weights
from megakd.models.architectures import FAMILIES, architecture_of
from megakd.models.next_tokens import load_readout

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
