"""Views that leave out whole layers of a model: outputs, names, counts, and errors."""

from __future__ import annotations

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
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from megakd.contract.views import View
from megakd.errors import ModelError
from megakd.models.architectures import architecture_of
from megakd.models.cutting import CUT, cut_config
from megakd.models.elastic import Elastic
from megakd.models.layers import with_layers, without_layers
from megakd.pruning.builder import counts_in_view, weights_of

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
def test_a_view_without_layers_computes_what_the_model_without_the_layers_computes(
    tmp_path, family, layers
):
    model, kind = build(family), task_of(family)
    stored = source_of(saved(model, tmp_path / "model"), kind)
    fewer = loaded(with_layers(stored, layers, where="student.layers"), kind)

    with Elastic(model).viewing(depth_view(model, layers)):
        result = logits(model)

    assert torch.allclose(result, logits(fewer), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_in_depth_and_width_computes_what_its_view_computes(family):
    model = build(family)
    heads = None if family in KEEPS_HEADS else 2
    view = depth_view(model, (1, 3), heads=heads, neurons=8)
    smaller = cut(model, task_of(family), view)

    with Elastic(model).viewing(view):
        result = logits(model)

    assert torch.allclose(result, logits(smaller), atol=2e-6, rtol=1e-5)
    assert not smaller.config.model_type.startswith(CUT)
    assert architecture_of(smaller.config).number_of_layers(smaller.config) == 2


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
    weights = weights_of(source, task("causal_lm"))

    counted = counts_in_view(weights, source, view).parameters

    smaller = cut(model, "causal_lm", view)
    assert counted == sum(weight.numel() for weight in smaller.parameters())


def test_a_sliding_window_stays_with_its_layer():
    config = build("gemma2").config
    shallow, _ = without_layers(config, depth_view(build("gemma2"), (2, 3)))
    assert shallow.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [((), "keeps the layers"), ((1, 4), "has the layers 1 to 3"), ((3, 1), "keeps the layers")],
)
def test_layers_that_a_model_does_not_have_are_refused(layers, message):
    model = build("llama")
    with pytest.raises(ModelError, match=message):
        cut_config(model.config, depth_view(model, layers))


def test_a_layer_with_units_cannot_be_left_out():
    model = build("llama")
    view = depth_view(model, (1, 2))._replace(neurons=(20, 20, 5))
    with pytest.raises(ModelError, match=r"leaves out layer 3 and keeps .*\(0, 5\)"):
        cut_config(model.config, view)
