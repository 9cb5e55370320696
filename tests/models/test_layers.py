"""Some layers of a model: which they are, under which numbers, and what stays as it is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_cuts import FAMILIES, build, cut, loaded, saved, source_of, task, task_of, view_of
from transformers import BertConfig, GPT2Config

from megakd.config.models import ScratchModel
from megakd.errors import ModelError
from megakd.models.architectures import architecture_of
from megakd.models.layers import config_with_layers, left_out, with_layers
from megakd.models.loading import resolve_model

KEY = "student.layers"
TOKENS = torch.arange(2, 14).reshape(2, 6)


def fewer(folder, kind, wanted):
    """The folder with some of its layers, as it is loaded."""
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
    assert list(result.config.head_counts) == [2, 1]
    assert list(result.config.neuron_counts) == [1, 7]


def test_layers_whose_scores_depend_on_their_number_keep_it():
    config: Any = GPT2Config(n_layer=4, scale_attn_by_inverse_layer_idx=True)
    architecture = architecture_of(config)

    assert config_with_layers(config, architecture, (1, 2)).n_layer == 2
    with pytest.raises(ModelError, match="which changes if an earlier layer is left out"):
        config_with_layers(config, architecture, (1, 3))


@given(st.integers(1, 40), st.data())
def test_a_number_of_layers_keeps_the_first_the_last_and_equal_gaps_between(count, data):
    wanted = data.draw(st.integers(1, count))
    source = source_like(count)

    numbers = with_layers(source, wanted, where=KEY).layers

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
