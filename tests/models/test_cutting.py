"""Views become models of their own: configs, weights, and folders from file to file."""

from __future__ import annotations

import json

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
    saved,
    source_of,
    task,
    task_of,
    tokenizer,
    view_of,
)
from transformers import AutoTokenizer

from megakd.contract.views import View
from megakd.models.architectures import architecture_of
from megakd.models.cutting import cut_config, reshape_folder
from megakd.models.elastic import Elastic

FFN = View((6, 6, 6), (8, 8, 8))
UNIFORM = View((2, 2, 2), (8, 8, 8))
RAGGED = View((1, 3, 2), (7, 20, 1))


def reshape(source, folder, **changes):
    kind = task_of(source.architecture.model_type.removeprefix("cut_"))
    kind = changes.pop("kind", kind)
    labels = () if kind in ("causal_lm", "mlm") else LABELS
    facts = {"task": task(kind), "label_names": labels, "tokenizer": tokenizer(), **changes}
    reshape_folder(source, folder, **facts)
    return folder


def stored(tmp_path, family: str, **changes):
    """A model, and the same as a folder that megakd has found."""
    model = build(family, **changes)
    return model, source_of(saved(model, tmp_path / "whole"), task_of(family))


@pytest.mark.parametrize(
    ("family", "view", "expected"),
    [
        *((family, FFN, family) for family in ("bert", "roberta", "distilbert", "electra", "gpt2")),
        *((family, UNIFORM, family) for family in ("llama", "mistral", "qwen2", "qwen3")),
        *((family, UNIFORM, f"cut_{family}") for family in ("bert", "distilbert", "gpt2")),
        *((family, RAGGED, f"cut_{family}") for family in ("bert", "llama", "qwen3", "gpt2")),
        # Two heads are as wide as what is left of the hidden states.
        ("bert", UNIFORM._replace(width=8), "bert"),
        ("bert", FFN._replace(width=23), "cut_bert"),
        ("qwen2", UNIFORM._replace(width=9), "qwen2"),
        # Llama's config wants heads that divide the width.
        ("llama", UNIFORM._replace(width=22), "cut_llama"),
        ("llama", UNIFORM._replace(width=20), "llama"),
        ("bert", View((6, 6, 6), (0, 0, 0)), "cut_bert"),
        ("qwen2", View((0, 0, 0), (8, 8, 8)), "cut_qwen2"),
    ],
    ids=str,
)
def test_a_stock_config_is_used_wherever_it_can_say_the_shape(family, view, expected):
    model = build(family)

    config = cut_config(model.config, view)

    assert config.model_type == expected
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


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_twice_is_cutting_once(family):
    whole, kind = build(family), task_of(family)
    full = full_view(whole)
    first = View(tuple(max(1, n - 1) for n in full.heads), (15,) * len(full.neurons))
    last = view_of(whole, "empty")
    last = last._replace(heads=tuple(map(min, last.heads, first.heads)))

    twice = cut(cut(whole, kind, first), kind, last)

    once = cut(whole, kind, last)
    assert type(twice) is type(once)
    assert full_view(twice) == full_view(once)
    assert torch.equal(logits(twice), logits(once))


def test_a_cut_model_can_become_a_stock_one_again():
    whole = build("llama")
    ragged = cut(whole, "causal_lm", View((2, 3, 2), (9, 20, 12)))

    again = cut(ragged, "causal_lm", UNIFORM)

    assert again.config.model_type == "llama"
    assert not hasattr(again.config, "head_counts")
    assert torch.equal(logits(again), logits(cut(whole, "causal_lm", UNIFORM)))


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


@pytest.mark.parametrize(("view", "width"), [("ragged", 10), ("empty", None)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_computes_what_the_elastic_view_does(family, view, width):
    whole = build(family)
    kept = view_of(whole, view)._replace(width=width)
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
    model, source = stored(tmp_path, family)
    kept, order = view_of(model, view), order_of(model)
    expected = cut(model, task_of(family), kept, order)

    folder = reshape(source, tmp_path / "cut", view=kept, order=order, extra={"a.txt": "b"})

    actual = loaded(folder, task_of(family))
    assert type(actual) is type(expected)
    assert torch.equal(logits(actual), logits(expected))
    assert (folder / "a.txt").read_text() == "b"
    assert AutoTokenizer.from_pretrained(folder)("w7")["input_ids"] == [7]


@pytest.mark.parametrize("family", ["bert", "enct5"])
def test_weights_keep_the_dtype_of_the_file(tmp_path, family):
    model = build(family).to(torch.bfloat16)
    source = source_of(saved(model, tmp_path / "whole"), "classification")

    folder = reshape(source, tmp_path / "cut", view=view_of(model, "empty"))

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

    folder = reshape(source, tmp_path / "cut", view=RAGGED, kind=kind)

    result = loaded(folder, kind)
    inputs, outputs = result.get_input_embeddings().weight, result.get_output_embeddings().weight
    assert (outputs is inputs) == tied
    assert torch.equal(outputs, model.get_output_embeddings().weight)
    written = load_file(folder / "model.safetensors")
    assert sum(tensor.shape == (VOCABULARY, 24) for tensor in written.values()) == 2 - tied


@pytest.mark.parametrize("family", ["bert", "roberta", "enct5"])
def test_the_labels_of_what_is_written_are_in_the_datas_order(tmp_path, family):
    model, source = stored(tmp_path, family)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    backwards = {str(number): name for number, name in enumerate(reversed(LABELS))}
    config |= {"id2label": backwards, "label2id": {v: int(k) for k, v in backwards.items()}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    source = source_of(tmp_path / "whole", task_of(family))

    folder = reshape(source, tmp_path / "sorted", order=order_of(model))

    written = loaded(folder, task_of(family))
    torch.testing.assert_close(logits(written), logits(model).flip(-1), atol=1e-5, rtol=0)
    assert [written.config.id2label[n] for n in range(len(LABELS))] == list(LABELS)
