"""Views become models of their own: configs, weights, and folders from file to file."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_cuts import (
    FAMILIES,
    LABELS,
    T5S,
    VOCABULARY,
    build,
    cut,
    full_view,
    loaded,
    logits,
    order_of,
    reshaped,
    saved,
    source_of,
    task,
    task_of,
    view_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.config.sections import ScratchModel
from megakd.errors import ModelError
from megakd.models.architectures import config_in
from megakd.models.cutting import cut_class_name, cut_config, is_stock
from megakd.models.elastic import Elastic
from megakd.models.loading import resolve_model
from megakd.models.structure import architecture_of
from megakd.models.views import View
from megakd.training.allocation import UnitScores, view_at

KINDS = ("heads", "neurons")
FFN = View((6, 6, 6), (8, 8, 8))
UNIFORM = View((2, 2, 2), (8, 8, 8))
RAGGED = View((1, 3, 2), (7, 20, 1))


@pytest.mark.parametrize(
    ("family", "view", "expected"),
    [
        *((family, FFN, family) for family in ("bert", "roberta", "distilbert", "electra", "gpt2")),
        *((family, UNIFORM, family) for family in ("llama", "mistral", "qwen2", "qwen3")),
        *((family, UNIFORM, "narrow") for family in ("bert", "distilbert", "gpt2")),
        *((family, RAGGED, "narrow") for family in ("bert", "llama", "qwen3", "gpt2")),
        # Two heads are as wide as what is left of the hidden states.
        ("bert", UNIFORM._replace(width=8), "bert"),
        ("bert", FFN._replace(width=23), "narrow"),
        ("qwen2", UNIFORM._replace(width=9), "qwen2"),
        # Llama's config wants heads that divide the width.
        ("llama", UNIFORM._replace(width=22), "narrow"),
        ("llama", UNIFORM._replace(width=20), "llama"),
        ("bert", View((6, 6, 6), (0, 0, 0)), "narrow"),
        ("qwen2", View((0, 0, 0), (8, 8, 8)), "narrow"),
    ],
    ids=str,
)
def test_a_stock_config_is_used_wherever_it_can_say_the_shape(family, view, expected):
    model = build(family)

    config = cut_config(model.config, view)

    assert config.model_type == family
    assert is_stock(config) == (expected == family)
    units = architecture_of(config).units(config)
    assert units == view._replace(width=view.width or 24)
    assert architecture_of(config).heads(config).width == (6 if family == "qwen3" else 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_view_is_the_config_itself(family):
    config = build(family).config
    same = cut_config(config, architecture_of(config).units(config))
    assert type(same) is type(config)
    assert same.to_dict() == config.to_dict()
    assert same is not config


def test_other_keys_of_the_config_stay():
    keys = {"hidden_dropout_prob": 0.3, "layer_norm_eps": 1e-5, "pad_token_id": 5}
    config = build("bert", **keys).config

    for view in (FFN, RAGGED):
        cut_one = cut_config(config, view)
        assert {name: getattr(cut_one, name) for name in keys} == keys
        assert cut_one.id2label == dict(enumerate(LABELS))


def test_embeddings_as_wide_as_the_layers_are_narrowed_with_them():
    model = build("electra", embedding_size=24)
    smaller = cut(model, "classification", RAGGED._replace(heads=(1, 6, 2), width=10))
    assert smaller.config.embedding_size == 10
    assert logits(smaller).shape == (2, len(LABELS))


# A cut of even layers becomes a stock model again.
@pytest.mark.parametrize(
    ("family", "view"), [*((family, "empty") for family in FAMILIES), ("llama", "uniform")]
)
def test_cutting_twice_is_cutting_once(family, view):
    whole, kind = build(family), task_of(family)
    full = full_view(whole)
    first = View(tuple(max(1, n - 1) for n in full.heads), (15,) * len(full.neurons))
    last = view_of(whole, view)
    last = last._replace(heads=tuple(map(min, last.heads, first.heads)))

    twice = cut(cut(whole, kind, first), kind, last)

    once = cut(whole, kind, last)
    assert type(twice) is type(once)
    more = twice.config.to_dict().keys() ^ once.config.to_dict().keys()
    assert more <= {"head_dim"}  # the config of even layers states what others leave out
    assert full_view(twice) == full_view(once)
    assert torch.equal(logits(twice), logits(once))


@pytest.mark.parametrize("family", FAMILIES)
def test_sorting_changes_nothing_and_comes_before_the_cut(family):
    whole, kind = build(family), task_of(family)
    order, view = order_of(whole), view_of(whole, "empty")

    ordered = cut(whole, kind, full_view(whole), order)
    at_once = cut(whole, kind, view, order)

    assert torch.allclose(logits(ordered), logits(whole), atol=1e-5)
    assert torch.equal(logits(at_once), logits(cut(ordered, kind, view)))
    assert not torch.allclose(logits(at_once), logits(cut(whole, kind, view)), atol=1e-3)


@pytest.mark.parametrize("family", T5S)
def test_heads_that_are_sorted_twice_keep_their_columns(family):
    whole = build(family)
    full = full_view(whole)

    once = cut(whole, "classification", full, order_of(whole))
    twice = cut(once, "classification", full, order_of(whole, seed=7))

    assert once.config.head_columns != twice.config.head_columns
    assert torch.allclose(logits(twice), logits(whole), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_cut_model_computes_what_the_elastic_view_does(family):
    whole = build(family)
    kept = view_of(whole, "ragged")._replace(width=10)
    smaller = cut(whole, task_of(family), kept)
    elastic = Elastic(whole)

    with elastic.viewing(kept):
        expected = logits(whole)

    assert torch.allclose(logits(smaller), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "qwen3", "gpt2", "t5_encoder"])
def test_a_cut_model_can_be_elastic_in_its_turn(family):
    whole = build(family)
    smaller = cut(whole, task_of(family), view_of(whole, "empty"))
    inner = full_view(smaller)._replace(heads=(0, 1, 0), neurons=(3, 0, 0))
    expected = logits(cut(smaller, task_of(family), inner))

    with Elastic(smaller).viewing(inner):
        actual = logits(smaller)

    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "view"),
    [
        *((family, "empty") for family in ("bert", "llama", "gpt2", "enct5")),
        *(("llama", view) for view in ("uniform", "ragged", "full")),
    ],
)
def test_a_folder_is_cut_from_file_to_file(tmp_path, family, view):
    model, kind = build(family), task_of(family)
    source = source_of(saved(model, tmp_path / "whole"), kind)
    kept, order = view_of(model, view), order_of(model)
    expected = cut(model, kind, kept, order)

    options = {"view": kept, "order": order, "extra": {"a.txt": "b"}}
    folder = reshaped(source, tmp_path / "cut", kind, **options)

    actual = loaded(folder, kind)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(expected).__name__]
    assert type(actual) is type(expected)
    assert torch.equal(logits(actual), logits(expected))
    assert (folder / "a.txt").read_text() == "b"
    assert AutoTokenizer.from_pretrained(folder)("w7")["input_ids"] == [7]


@pytest.mark.parametrize("family", ["bert", "enct5"])
def test_weights_keep_the_dtype_of_the_file(tmp_path, family):
    model = build(family).to(torch.bfloat16)
    source = source_of(saved(model, tmp_path / "whole"), "classification")

    folder = reshaped(source, tmp_path / "cut", view=view_of(model, "empty"))

    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.numel()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("family", "kind", "tied"),
    [("bert", "mlm", True), ("gpt2", "causal_lm", True), ("llama", "causal_lm", False)],
)
def test_tied_weights_stay_tied_and_others_two(tmp_path, family, kind, tied):
    model = build(family, kind, tie_word_embeddings=tied)
    source = source_of(saved(model, tmp_path / "whole"), kind)

    folder = reshaped(source, tmp_path / "cut", kind, view=RAGGED)

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [f"Narrow{type(model).__name__}"]
    result = loaded(folder, kind)
    inputs, outputs = result.get_input_embeddings().weight, result.get_output_embeddings().weight
    assert (outputs is inputs) == tied
    assert torch.equal(outputs, model.get_output_embeddings().weight)
    written = load_file(folder / "model.safetensors")
    assert sum(tensor.shape == (VOCABULARY, 24) for tensor in written.values()) == 2 - tied


@pytest.mark.parametrize("family", ["bert", "roberta", "enct5"])
def test_the_labels_of_what_is_written_are_in_the_datas_order(tmp_path, family):
    model = build(family)
    saved(model, tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    backwards = {str(number): name for number, name in enumerate(reversed(LABELS))}
    config |= {"id2label": backwards, "label2id": {v: int(k) for k, v in backwards.items()}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    source = source_of(tmp_path / "whole", "classification")

    folder = reshaped(source, tmp_path / "sorted", order=order_of(model))

    written = loaded(folder, "classification")
    torch.testing.assert_close(logits(written), logits(model).flip(-1), atol=1e-5, rtol=0)
    assert [written.config.id2label[n] for n in range(len(LABELS))] == list(LABELS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("view", ["ragged", "empty"])
def test_the_config_of_uneven_layers_lists_their_units(family, view, tmp_path):
    model = build(family)
    kept = view_of(model, view)

    config = cut_config(model.config, kept)

    config.save_pretrained(tmp_path)
    saved_keys = json.loads((tmp_path / "config.json").read_text())
    if family in T5S:  # `num_heads` counts the columns of the bias that all layers share
        assert saved_keys["d_ff"] == max(kept.neurons)
        assert saved_keys["head_counts"] == list(kept.heads)
        assert saved_keys["neuron_counts"] == list(kept.neurons)
        return
    listed = [[one["total"] for one in saved_keys["narrow"][k]["layers"]] for k in KINDS]
    assert listed == [list(kept.heads), list(kept.neurons)]
    again = config_in(tmp_path)
    heads = architecture_of(again).heads(again)
    shared = 2 if "num_key_value_heads" in FAMILIES[family] else 1
    assert heads[:2] == (max(kept.heads) * shared, max(kept.heads))
    assert architecture_of(again).units(again) == kept._replace(width=24)


def test_a_cut_model_of_an_earlier_version_is_refused_by_name(tmp_path):
    config = cut_config(build("llama").config, RAGGED)
    config.narrow = {"blocks": "model.layers", "layers": [{}, {}, {}]}
    config.save_pretrained(tmp_path)

    with pytest.raises(ModelError, match="a cut model of an earlier version of megakd"):
        config_in(tmp_path)


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

    folder = reshaped(source, tmp_path / "cut", "causal_lm", view=view)

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


# Models that cannot be cut are refused before anything is written.


@pytest.fixture
def source(tmp_path):
    return source_of(saved(build("bert"), tmp_path / "whole"), "classification")


@pytest.mark.parametrize(
    "view",
    [
        View((6, 7, 6), (20, 20, 20)),
        View((6, 6, 6), (20, 20, 21)),
        View((6, -1, 6), (20, 20, 20)),
        View((6, 6), (20, 20, 20)),
        View((6, 6, 6), (20, 20)),
        View((6, 6, 6), (20, 20, 20), 25),
        View((6, 6, 6), (20, 20, 20), 0),
    ],
)
def test_a_view_lies_within_the_model(tmp_path, source, view):
    message = rf"cannot be cut to {re.escape(str(view))}, .* neurons=\(20, 20, 20\), width=24"
    with pytest.raises(ModelError, match=message):
        reshaped(source, tmp_path / "cut", view=view)
    assert not (tmp_path / "cut").exists()


def test_a_model_without_weights_has_nothing_to_cut(tmp_path):
    spec = ScratchModel(config={"model_type": "bert"})
    scratch = resolve_model(spec, task(), where="teacher.model")
    with pytest.raises(ModelError, match=r"teacher\.model: new bert has no stored weights"):
        reshaped(scratch, tmp_path / "cut")


def test_weights_of_another_model_are_refused(tmp_path, source):
    file = tmp_path / "whole" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 21}))

    with pytest.raises(ModelError, match=r"check that config\.json and the weights belong to the"):
        reshaped(source_of(source.folder, "classification"), tmp_path / "cut")

    assert not (tmp_path / "cut").exists()


def test_a_file_that_is_cut_short_meanwhile_leaves_what_was_there(tmp_path, source):
    reshaped(source, tmp_path / "cut", view=View((2, 2, 2), (8, 8, 8)))
    before = (tmp_path / "cut" / "model.safetensors").read_bytes()
    file = tmp_path / "whole" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(ModelError, match="ended after"):
        reshaped(source, tmp_path / "cut", view=View((1, 1, 1), (8, 8, 8)))

    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_the_class_of_a_cut_of_a_cut_model_has_the_same_head():
    model = cut(build("qwen2"), "causal_lm", RAGGED)
    config = cut_config(model.config, View((1, 1, 1), (1, 1, 1)))
    assert cut_class_name(model, model.config) == "NarrowQwen2ForCausalLM"
    assert cut_class_name(model, config) == "Qwen2ForCausalLM"
    assert full_view(model) == RAGGED._replace(width=24)


def test_embeddings_that_would_lose_their_projection_are_refused():
    view = View((6, 6, 6), (20, 20, 20), 16)
    with pytest.raises(ModelError, match="width of 16, which is the embedding_size"):
        cut_config(build("electra").config, view)
