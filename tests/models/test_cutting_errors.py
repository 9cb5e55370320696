"""Models that cannot be cut are refused before anything is written."""

from __future__ import annotations

import json

import pytest
from tiny_cuts import (
    LABELS,
    build,
    cut,
    full_view,
    order_of,
    saved,
    source_of,
    task,
    tokenizer,
    view_of,
)

from megakd.config.models import ScratchModel
from megakd.contract.views import View
from megakd.errors import ModelError
from megakd.models import cutting
from megakd.models.cutting import cut_class_name, cut_config, reshape_folder
from megakd.models.loading import resolve_model


def source(tmp_path, **changes):
    return source_of(saved(build("bert", **changes), tmp_path / "whole"), "classification")


def reshape(result, folder, **changes):
    facts = {"task": task(), "label_names": LABELS, "tokenizer": tokenizer(), **changes}
    reshape_folder(result, folder, **facts)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View((6, 7, 6), (20, 20, 20)), "keeps 7 heads of layer 2, which has 6"),
        (View((6, 6, 6), (20, 20, 21)), "keeps 21 neurons of layer 3, which has 20"),
        (View((6, -1, 6), (20, 20, 20)), "keeps -1 heads of layer 2"),
        (View((6, 6), (20, 20, 20)), "heads for 2 layers, and the model has 3"),
        (View((6, 6, 6), (20, 20)), "neurons for 2 layers, and the model has 3"),
        (View((6, 6, 6), (20, 20, 20), 25), "a width of 25, and the model has a width of 24"),
        (View((6, 6, 6), (20, 20, 20), 0), "a width of 0, and the model has a width of 24"),
    ],
)
def test_a_view_lies_within_the_model(tmp_path, view, message):
    result = source(tmp_path)
    with pytest.raises(ModelError, match=message):
        reshape(result, tmp_path / "cut", view=view)
    assert not (tmp_path / "cut").exists()


def test_an_order_has_every_unit_once(tmp_path):
    result, order = source(tmp_path), order_of(build("bert"))
    twice = order._replace(heads=((0, 0, 1, 2, 3, 4), *order.heads[1:]))
    for wrong in (twice, order._replace(neurons=order.neurons[1:])):
        with pytest.raises(ModelError, match="an order must list every unit of the model once"):
            reshape(result, tmp_path / "cut", order=wrong)


def test_a_model_without_weights_has_nothing_to_cut(tmp_path):
    spec = ScratchModel(config={"model_type": "bert"})
    scratch = resolve_model(spec, task(), where="teacher.model")
    with pytest.raises(ModelError, match=r"teacher\.model: new bert has no stored weights"):
        reshape(scratch, tmp_path / "cut")


def test_weights_of_another_model_are_refused(tmp_path):
    result = source(tmp_path)
    file = tmp_path / "whole" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 21}))

    with pytest.raises(ModelError, match=r"check that config\.json and the weights belong to the"):
        reshape(source_of(result.folder, "classification"), tmp_path / "cut")

    assert not (tmp_path / "cut").exists()


def test_a_file_that_is_cut_short_meanwhile_leaves_what_was_there(tmp_path):
    result = source(tmp_path)
    reshape(result, tmp_path / "cut", view=View((2, 2, 2), (8, 8, 8)))
    before = (tmp_path / "cut" / "model.safetensors").read_bytes()
    file = tmp_path / "whole" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(ModelError, match="ended after"):
        reshape(result, tmp_path / "cut", view=View((1, 1, 1), (8, 8, 8)))

    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_table_that_disagrees_with_the_class_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "weight_axes", lambda model: {})
    with pytest.raises(RuntimeError, match="does not agree with its class"):
        reshape(source(tmp_path), tmp_path / "cut", view=View((2, 2, 2), (8, 8, 8)))
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(
    ("family", "kind", "view", "expected"),
    [
        ("bert", "classification", "ragged", "CutBertForSequenceClassification"),
        ("bert", "mlm", "full", "BertForMaskedLM"),
        ("gpt2", "causal_lm", "empty", "CutGPT2LMHeadModel"),
        ("qwen2", "causal_lm", "uniform", "Qwen2ForCausalLM"),
        ("enct5", "classification", "ragged", "EncT5ForSequenceClassification"),
    ],
)
def test_the_class_of_a_cut_model_has_the_same_head(family, kind, view, expected):
    model = build(family, kind)
    assert cut_class_name(model, cut_config(model.config, view_of(model, view))) == expected


def test_the_class_of_a_cut_of_a_cut_model_has_the_same_head():
    model = cut(build("qwen2"), "causal_lm", View((1, 3, 2), (7, 20, 1)))
    config = cut_config(model.config, View((1, 1, 1), (1, 1, 1)))
    assert cut_class_name(model, model.config) == "CutQwen2ForCausalLM"
    assert cut_class_name(model, config) == "Qwen2ForCausalLM"
    assert full_view(model) == View((1, 3, 2), (7, 20, 1), 24)


def test_embeddings_that_would_lose_their_projection_are_refused():
    view = View((6, 6, 6), (20, 20, 20), 16)
    with pytest.raises(ModelError, match="width of 16, which is the embedding_size"):
        cut_config(build("electra").config, view)
