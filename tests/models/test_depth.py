"""Some layers of a model: in views, in cuts, and under new numbers in a smaller model."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cuts import (
    FAMILIES,
    T5S,
    build,
    cut,
    loaded,
    logits,
    reshaped,
    saved,
    source_of,
    task,
    task_of,
    view_of,
)
from transformers import AutoModelForCausalLM, BertConfig, PreTrainedModel

from megakd.config.sections import ScratchModel
from megakd.errors import ModelError
from megakd.models.cutting import cut_config
from megakd.models.elastic import Elastic
from megakd.models.layers import left_out, with_layers, without_layers
from megakd.models.loading import resolve_model
from megakd.models.structure import architecture_of
from megakd.models.views import View, evenly_spaced
from megakd.training.facts import RunFacts

KEEPS_HEADS = ("bert", "roberta", "distilbert", "electra", "gpt2")
"""Families whose stock class has heads as wide as the hidden states divided by their number."""


def depth_view(
    model: PreTrainedModel, layers: tuple[int, ...], heads: int | None = None, neurons: int = 20
) -> View:
    """A view with the same units in the layers that it keeps, and none in the others."""
    architecture = architecture_of(model.config)
    whole = architecture.units(model.config)
    depth = architecture.number_of_layers(model.config)
    numbers = range(1, depth + 1)
    # What lies outside the layers, as in EncT5's decoder, stays.
    return View(
        tuple((heads or whole.heads[0]) if number in layers else 0 for number in numbers)
        + whole.heads[depth:],
        tuple(neurons if number in layers else 0 for number in numbers) + whole.neurons[depth:],
        layers=layers,
    )


@pytest.mark.parametrize(
    ("family", "layers"),
    [*((family, (1, 3)) for family in FAMILIES), *(("llama", (3,)), ("bert", (3,)))]
    + [(family, (2, 3)) for family in T5S],
    ids=str,
)
def test_a_cut_in_depth_and_width_computes_what_its_view_computes(family, layers):
    model = build(family)
    heads = None if family in KEEPS_HEADS else 2
    view = depth_view(model, layers, heads=heads, neurons=8)
    smaller = cut(model, task_of(family), view)

    with Elastic(model).viewing(view):
        result = logits(model)

    assert torch.allclose(result, logits(smaller), atol=2e-6, rtol=1e-5)
    assert not smaller.config.model_type.startswith("narrow")
    assert architecture_of(smaller.config).number_of_layers(smaller.config) == len(layers)


@pytest.mark.parametrize("family", ["bert", "t5_encoder", "llama"])
def test_layers_that_a_view_leaves_out_get_gradients_of_zero(family):
    model = build(family)
    left = architecture_of(model.config).block_of(model, 2)

    with Elastic(model).viewing(depth_view(model, (1, 3))):
        model(input_ids=torch.arange(2, 26).reshape(2, 12)).logits.sum().backward()

    # The first layer holds T5's position bias, which all layers share.
    assert all(not weight.grad.any() for weight in left.parameters())


def test_a_folder_cut_in_depth_opens_as_a_stock_model_with_equal_outputs(tmp_path):
    model = build("qwen3")
    view = depth_view(model, (1, 3), heads=1, neurons=12)
    source = source_of(saved(model, tmp_path / "model"), "causal_lm")

    folder = reshaped(source, tmp_path / "cut", "causal_lm", view=view)

    opened = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(opened).__name__ == "Qwen3ForCausalLM"
    assert torch.equal(logits(opened), logits(cut(model, "causal_lm", view)))


@settings(max_examples=12)
@given(
    layers=st.sets(st.integers(1, 3), min_size=1).map(lambda result: tuple(sorted(result))),
    heads=st.integers(1, 3),
    neurons=st.integers(1, 20),
)
def test_a_view_counts_the_weights_that_its_cut_has(tmp_path_factory, layers, heads, neurons):
    model = build("mistral")
    view = depth_view(model, layers, heads=heads, neurons=neurons)
    source = source_of(saved(model, tmp_path_factory.mktemp("model")), "causal_lm")
    config: Any = SimpleNamespace(task=task("causal_lm"))

    counted = RunFacts(config, {}, world=1).parameters(source, view).parameters

    smaller = cut(model, "causal_lm", view)
    assert counted == sum(weight.numel() for weight in smaller.parameters())


def test_a_sliding_window_stays_with_its_layer():
    config = build("gemma2").config
    shallow, _ = without_layers(config, depth_view(build("gemma2"), (2, 3)))
    assert shallow.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("layers", "changes"),
    [((), {}), ((1, 4), {}), ((3, 1), {}), ((1, 2), {"neurons": (20, 20, 5)})],
)
def test_layers_that_a_model_lacks_and_units_of_layers_that_go_are_refused(layers, changes):
    model = build("llama")
    view = depth_view(model, layers)._replace(**changes)
    with pytest.raises(ModelError, match=r"has the layers 1 to 3, and cannot have the layers \("):
        cut_config(model.config, view)


KEY = "student.layers"
TOKENS = torch.arange(2, 14).reshape(2, 6)


def fewer(folder, kind, wanted):
    return loaded(with_layers(source_of(folder, kind), wanted, where=KEY), kind)


@pytest.mark.parametrize(
    ("family", "wanted"),
    [*((family, (3, 1)) for family in FAMILIES), *(("bert", n) for n in ((3,), (1, 3), 2))],
    ids=str,
)
def test_layers_keep_their_weights_under_new_numbers_and_all_else_stays(tmp_path, family, wanted):
    kind, model = task_of(family), build(family)
    architecture = architecture_of(model.config)
    numbers = (1, 3) if wanted == 2 else wanted

    actual = fewer(saved(model, tmp_path / "model"), kind, wanted)

    assert architecture.number_of_layers(actual.config) == len(numbers)
    for place, number in enumerate(numbers, start=1):
        expected = architecture.block_of(model, number).state_dict()
        for name, weight in architecture.block_of(actual, place).state_dict().items():
            if "relative_attention_bias" not in name:
                torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    whole = dict(model.named_parameters())
    inside = f"{architecture.backbone}.{architecture.blocks}."
    for name, weight in actual.named_parameters():
        if not name.startswith(inside) or "relative_attention_bias" in name:
            torch.testing.assert_close(weight, whole[name], rtol=0, atol=0)


def test_what_a_cut_model_says_of_every_layer_goes_with_it(tmp_path):
    model = build("bert")
    ragged = cut(model, "classification", view_of(model, "ragged"))
    result = fewer(saved(ragged, tmp_path / "cut"), "classification", (3, 1))
    units = architecture_of(result.config).units(result.config)
    assert units[:2] == ((2, 1), (1, 7))


def test_layers_whose_scores_depend_on_their_number_keep_it(tmp_path):
    model = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    source = source_of(saved(model, tmp_path), "causal_lm")

    assert with_layers(source, (1, 2), where=KEY).config.n_layer == 2
    with pytest.raises(ModelError, match="gpt2 model cannot keep the layers 1, 3 alone: its outp"):
        with_layers(source, (1, 3), where=KEY)


@given(st.integers(1, 40), st.data())
def test_a_number_of_layers_keeps_the_first_the_last_and_equal_gaps_between(count, data):
    wanted = data.draw(st.integers(1, count))

    numbers = evenly_spaced(count, wanted)

    assert len(numbers) == len({*numbers}) == wanted
    assert numbers[0] == 1
    assert numbers[-1] == (count if wanted > 1 else 1)
    gaps = [b - a for a, b in pairwise(numbers)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_scores_choose_the_most_important_layers_and_the_first_of_equals():
    numbers = with_layers(source_like(4), 2, where=KEY, scores=(0.5, -1.0, 0.5, 0.5)).layers
    assert numbers == (1, 3)


@pytest.mark.parametrize(
    ("family", "layer"), [*((family, 1) for family in FAMILIES), ("bert", 3), ("llama", 3)]
)
def test_a_model_without_a_layer_computes_what_the_model_of_the_others_does(
    tmp_path, family, layer
):
    kind, model = task_of(family), build(family)
    folder = saved(model, tmp_path / "model")
    whole = fewer(folder, kind, 3)
    others = fewer(folder, kind, [n for n in (1, 2, 3) if n != layer])

    with torch.inference_mode():
        with left_out(whole, layer):
            result = whole(TOKENS).logits
        torch.testing.assert_close(result, others(TOKENS).logits)
        assert not torch.equal(result, whole(TOKENS).logits)


def source_like(layers: int):
    keys = BertConfig(num_hidden_layers=layers).to_diff_dict()
    model = ScratchModel(config={**keys, "model_type": "bert"})
    return resolve_model(model, task(), where="student.model")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (9, r"must be at most 3, the number of layers of the model \(got 9\)"),
        ((1, 7), "layer 7 does not exist; the model has the layers 1 to 3"),
    ],
    ids=str,
)
def test_layers_that_are_not_there_are_refused(tmp_path, wanted, message):
    source = source_of(saved(build("bert"), tmp_path / "model"), "classification")
    with pytest.raises(ModelError, match=message):
        with_layers(source, wanted, where=KEY)
