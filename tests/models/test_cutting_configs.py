"""The config.json of a cut model says its own counts, and a stock one wherever that can be."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_cuts import (
    FAMILIES,
    T5S,
    build,
    full_view,
    logits,
    saved,
    source_of,
    task,
    tokenizer,
    view_of,
)
from transformers import AutoModelForCausalLM

from megakd.contract.views import View
from megakd.models.architectures import architecture_of
from megakd.models.cutting import cut_config, reshape_folder
from megakd.models.elastic import Elastic
from megakd.models.modeling.modeling_cut import CutLlamaConfig
from megakd.pruning.allocation import UnitScores, view_at

RAGGED = View((1, 3, 2), (7, 20, 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("view", ["ragged", "empty"])
def test_the_config_of_uneven_layers_keeps_no_count_of_the_whole_model(family, view, tmp_path):
    model = build(family)
    kept = view_of(model, view)

    config = cut_config(model.config, kept)

    config.save_pretrained(tmp_path)
    saved_keys = json.loads((tmp_path / "config.json").read_text())
    assert saved_keys["head_counts"] == list(kept.heads)
    assert saved_keys["neuron_counts"] == list(kept.neurons)
    wrong = {"num_attention_heads", "num_key_value_heads", "n_head", "n_heads"}
    wrong |= {"intermediate_size", "n_inner", "hidden_dim"}
    assert not wrong & saved_keys.keys()
    if family in T5S:  # `num_heads` counts the columns of the bias that all layers share
        assert saved_keys["d_ff"] == max(kept.neurons)
        return
    again = type(config).from_pretrained(tmp_path)
    heads = architecture_of(again).heads(again)
    shared = 2 if "num_key_value_heads" in FAMILIES[family] else 1
    assert heads[:2] == (max(kept.heads) * shared, max(kept.heads))
    assert architecture_of(again).units(again) == kept._replace(width=24)


def test_a_config_of_an_earlier_version_says_its_counts_once_they_are_read(tmp_path):
    earlier = cut_config(build("llama").config, RAGGED).to_dict()
    del earlier["queries_per_key"]
    counts = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 20}
    (tmp_path / "config.json").write_text(json.dumps(earlier | counts))

    config = CutLlamaConfig.from_pretrained(tmp_path)

    assert config.queries_per_key == 2
    assert architecture_of(config).units(config) == RAGGED._replace(width=24)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "phi", "granite"])
def test_a_decoder_of_even_layers_loads_as_a_stock_model_with_the_logits_of_its_view(
    family, tmp_path
):
    """As `allocation: uniform` cuts it; a Llama's heads must divide the width too."""
    model = build(family)
    source = source_of(saved(model, tmp_path / "whole"), "causal_lm")
    scores = UnitScores(
        *(tuple(tuple(torch.rand(n).tolist()) for n in kind) for kind in full_view(model)[:2])
    )
    view = view_at(scores, 0.4, allocation="uniform", round_to=4, head_width=4)
    assert view == View((2, 2, 2), (12, 12, 12))

    folder = tmp_path / "cut"
    reshape_folder(
        source, folder, task=task("causal_lm"), label_names=(), tokenizer=tokenizer(), view=view
    )

    config = json.loads((folder / "config.json").read_text())
    counts = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 12}
    width = FAMILIES[family].get("head_dim", 4)
    assert {**config, **counts, "head_dim": width, "hidden_size": 24} == config
    assert "auto_map" not in config
    assert not list(folder.glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    assert type(stock) is type(model)
    with Elastic(model).viewing(view):
        assert torch.allclose(logits(stock), logits(model), atol=1e-6)
