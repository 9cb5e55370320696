"""Views that leave out whole layers of a decoder: outputs, names, counts, and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cuts import AUTO, DECODERS, build, logits, saved, source_of, task, tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from megakd.contract.views import View
from megakd.errors import ModelError
from megakd.models.architectures import architecture_of
from megakd.models.axes import weight_axes
from megakd.models.cutting import CUT, cut_config, cut_state, reshape_folder
from megakd.models.elastic import Elastic
from megakd.models.layers import renumbered, with_layers, without_layers
from megakd.models.loading import load_model
from megakd.pruning.builder import counts_in_view, weights_of

CUTTABLE = tuple(f for f in DECODERS if architecture_of(build(f).config).uncut is None)


def depth_view(
    model: PreTrainedModel, layers: tuple[int, ...], heads: int | None = None, neurons: int = 20
) -> View:
    """A view with the same units in the layers that it keeps, and none in the others."""
    whole = architecture_of(model.config).units(model.config)
    numbers = range(1, len(whole.heads) + 1)
    return View(
        tuple((heads or whole.heads[0]) if number in layers else 0 for number in numbers),
        tuple(neurons if number in layers else 0 for number in numbers),
        layers=layers,
    )


def cut_of(model: PreTrainedModel, view: View) -> PreTrainedModel:
    """The cut made in memory, of every tensor."""
    made = AUTO["causal_lm"].from_config(cut_config(model.config, view)).eval()
    state = cut_state(model.state_dict().items(), weight_axes(model), view)
    made.load_state_dict(dict(renumbered(state, model.config, view)), strict=True)
    return made


@pytest.mark.parametrize(
    ("family", "layers"),
    [*((family, (1, 3)) for family in CUTTABLE), ("llama", (3,)), ("gpt2", (1, 2))],
    ids=str,
)
def test_a_view_without_layers_computes_what_the_model_without_the_layers_computes(
    tmp_path, family, layers
):
    model = build(family)
    source = with_layers(
        source_of(saved(model, tmp_path / "model"), "causal_lm"), layers, where="student.layers"
    )
    fewer = load_model(
        source,
        task=task("causal_lm"),
        label_names=(),
        tokenizer_size=60,
        ds=None,
        dtype=torch.float32,
        seed=1,
        need_head=True,
    ).eval()

    with Elastic(model).viewing(depth_view(model, layers)):
        found = logits(model)

    assert torch.allclose(found, logits(fewer), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", CUTTABLE)
def test_a_cut_in_depth_and_width_computes_what_its_view_computes(family):
    model = build(family)
    heads = None if family == "gpt2" else 2
    view = depth_view(model, (1, 3), heads=heads, neurons=8)
    cut = cut_of(model, view)

    with Elastic(model).viewing(view):
        found = logits(model)

    assert torch.allclose(found, logits(cut), atol=2e-6, rtol=1e-5)
    assert not cut.config.model_type.startswith(CUT)
    assert cut.config.num_hidden_layers == 2


def test_a_folder_cut_in_depth_opens_as_a_stock_model_with_equal_outputs(tmp_path):
    model = build("qwen3")
    view = depth_view(model, (1, 3), heads=1, neurons=12)
    source = source_of(saved(model, tmp_path / "model"), "causal_lm")

    reshape_folder(
        source,
        tmp_path / "cut",
        task=task("causal_lm"),
        label_names=(),
        tokenizer=tokenizer(),
        view=view,
    )

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert type(opened).__name__ == "Qwen3ForCausalLM"
    assert torch.equal(logits(opened), logits(cut_of(model, view)))


@settings(max_examples=12)
@given(
    layers=st.sets(st.integers(1, 3), min_size=1).map(lambda found: tuple(sorted(found))),
    heads=st.integers(1, 3),
    neurons=st.integers(1, 20),
)
def test_a_view_counts_the_weights_that_its_cut_has(tmp_path_factory, layers, heads, neurons):
    model = build("mistral")
    view = depth_view(model, layers, heads=heads, neurons=neurons)
    source = source_of(saved(model, tmp_path_factory.mktemp("model")), "causal_lm")
    weights = weights_of(source, task("causal_lm"))

    counted = counts_in_view(weights, source, view).parameters

    assert counted == sum(weight.numel() for weight in cut_of(model, view).parameters())


def test_a_sliding_window_stays_with_its_layer():
    config = build("gemma2").config
    cut, _ = without_layers(config, depth_view(build("gemma2"), (2, 3)))
    assert cut.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "keeps the layers"),
        ((1, 4), r"has the layers 1 to 3"),
        ((3, 1), "keeps the layers"),
    ],
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


def test_layers_of_an_encoder_do_not_pass_hidden_states_on():
    model = build("bert")
    with pytest.raises(ModelError, match="does not pass hidden states on"):
        cut_config(model.config, View((6, 0, 6), (20, 0, 20), layers=(1, 3)))
