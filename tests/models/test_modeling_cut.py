"""Cut models compute what a whole model does of which nothing else is heard."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from elastic_views import without_dropout
from tiny_cuts import (
    CUTTABLE,
    DECODERS,
    FAMILIES,
    LABELS,
    MASKED,
    build,
    cut,
    logits,
    masked,
    randomised,
    task_of,
    view_of,
)
from torch import nn
from transformers import AutoModel

from megakd.models.modeling.modeling_cut import CutBertConfig, CutLlamaConfig, CutLlamaModel

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
BIASED = {"attention_bias": True, "mlp_bias": True}
KINDS = [
    *((family, task_of(family), {}) for family in FAMILIES),
    *((family, "mlm", {}) for family in MASKED),
    ("llama", "causal_lm", BIASED),
]
SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 60}


@pytest.mark.parametrize(("view", "attention"), [("ragged", "eager"), ("empty", "sdpa")])
@pytest.mark.parametrize(("family", "kind", "changes"), KINDS, ids=str)
def test_a_cut_model_computes_what_is_left_of_the_whole_one(family, kind, changes, attention, view):
    whole = build(family, kind, **changes)
    kept = view_of(whole, view)

    smaller = cut(whole, kind, kept)
    attention = "eager" if family == "gemma2" else attention  # sdpa has no cap on scores

    whole.set_attn_implementation(attention)
    smaller.set_attn_implementation(attention)
    assert smaller.num_parameters() < whole.num_parameters()
    assert torch.allclose(logits(smaller), logits(masked(whole, kept)), atol=3e-5)


@pytest.mark.parametrize("family", CUTTABLE)
def test_the_bare_model_gives_the_same_hidden_states(family):
    whole = build(family)
    smaller = cut(whole, task_of(family), view_of(whole, "empty"))

    bare = AutoModel.from_config(smaller.config).eval()
    bare.load_state_dict(smaller.base_model.state_dict(), strict=False)

    assert type(bare).__name__.startswith("Cut")
    actual, expected = (model(input_ids=IDS)[0] for model in (bare, smaller.base_model))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", CUTTABLE)
def test_a_saved_model_comes_back_whole(family, tmp_path):
    whole = build(family)
    smaller = cut(whole, task_of(family), view_of(whole, "empty"))

    smaller.save_pretrained(tmp_path)
    again, info = type(smaller).from_pretrained(tmp_path, output_loading_info=True)

    assert not any(info.values()), info
    assert again.config.head_counts == smaller.config.head_counts
    assert torch.equal(logits(again.eval()), logits(smaller))


@pytest.mark.parametrize("family", DECODERS)
def test_text_is_continued_with_and_without_a_cache_alike(family):
    whole = build(family)
    kept = view_of(whole, "empty")
    smaller = cut(whole, "causal_lm", kept)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    options |= {"attention_mask": torch.ones_like(IDS)}

    cached = smaller.generate(IDS, **options)

    assert cached.equal(smaller.generate(IDS, use_cache=False, **options))
    assert cached.equal(masked(whole, kept).generate(IDS, **options))


@pytest.mark.parametrize("family", ["bert", "distilbert", "qwen3", "gpt2"])
def test_attentions_are_told_of_every_layer(family):
    whole = build(family)
    smaller = cut(whole, task_of(family), view_of(whole, "empty"))
    smaller.set_attn_implementation("eager")

    attentions = smaller(input_ids=IDS, output_attentions=True).attentions

    heads = [count * smaller.config.queries_per_key for count in (0, 2, 1)]
    assert [tuple(weights.shape) for weights in attentions] == [(2, n, 4, 4) for n in heads]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_gradient_and_recomputing_changes_none(family):
    whole = build(family)
    smaller = cut(whole, task_of(family), view_of(whole, "empty"))
    plain = gradients(smaller)

    recomputed = without_dropout(copy.deepcopy(smaller))
    recomputed.config.use_cache = False
    recomputed.activation_checkpointing_enable()

    result = gradients(recomputed)
    assert all(gradient is not None for gradient in plain.values())
    for name, gradient in plain.items():
        assert torch.allclose(result[name], gradient, atol=1e-6), name


def gradients(model) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    output = model(input_ids=IDS).logits
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_what_has_no_elements_is_no_parameter_and_yet_has_a_name():
    whole = build("bert")
    smaller = cut(whole, "classification", view_of(whole, "empty"))
    assert all(parameter.numel() for parameter in smaller.parameters())
    assert set(smaller.state_dict()) == set(whole.state_dict())


def test_layers_are_made_one_by_one_so_that_no_whole_model_is_in_memory(monkeypatch):
    alive: weakref.WeakSet[nn.Linear] = weakref.WeakSet()
    most, make = 0, nn.Linear.__init__

    def counting(self, *sizes, **options):
        nonlocal most
        make(self, *sizes, **options)
        alive.add(self)
        most = max(most, sum(linear.weight.numel() for linear in alive))

    monkeypatch.setattr(nn.Linear, "__init__", counting)
    gc.collect()
    config = CutLlamaConfig(
        **(SHAPE | {"num_hidden_layers": 8, "intermediate_size": 400}),
        head_counts=[1] * 8,
        neuron_counts=[4] * 8,
    )
    model = CutLlamaModel(config)

    whole = 8 * 3 * 400 * 24
    kept = sum(weight.numel() for name, weight in model.named_parameters() if "proj" in name)
    assert kept < whole / 10
    assert most < kept + whole / 8


def test_a_config_without_counts_is_that_of_the_whole_model():
    config = CutBertConfig(**SHAPE, intermediate_size=20)
    assert config.head_counts == [6, 6, 6]
    assert config.neuron_counts == [20, 20, 20]
    assert config.head_width == 4


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, 3, 4], [1, -1, 2]])
def test_a_config_wants_a_number_for_each_layer(counts):
    with pytest.raises(ValueError, match="head_counts must be 3 numbers"):
        CutBertConfig(**SHAPE, head_counts=counts)


def test_new_weights_are_drawn_as_those_of_the_stock_model(recwarn):
    whole = build("bert")
    smaller = cut(whole, "classification", view_of(whole, "empty"))

    new = type(smaller)(smaller.config)

    parameters = dict(new.named_parameters())
    assert not recwarn.list
    assert all(torch.isfinite(parameter).all() for parameter in parameters.values())
    assert not parameters["bert.encoder.layer.0.attention.output.dense.bias"].any()
    assert 0.01 < parameters["bert.encoder.layer.1.attention.self.query.weight"].std() < 0.03
    assert new.config.num_labels == len(LABELS)
    assert not torch.equal(logits(new.eval()), logits(randomised(new)))
