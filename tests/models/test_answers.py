"""Answers of model folders to texts of any length, by weights or a graph, and folders with none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_cuts
import torch
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, GenerationConfig

from megakd.errors import ConfigError, DataError, ModelError
from megakd.models import onnx
from megakd.models.answers import answers_of

LONG = " ".join(f"w{20 + number % 40}" for number in range(60))  # w1, the padding, begins no word


def tokenizer():
    one = tiny_cuts.tokenizer()
    one.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return one


def saved(folder: Path, family: str = "bert"):
    model = tiny_cuts.build(family)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def probabilities(folder: Path, text: str) -> list[float]:
    (answer,) = answers_of(folder, [text])
    return list(answer["probabilities"].values())


@pytest.mark.parametrize(
    ("family", "tokens"), [("bert", 32), ("roberta", 30), ("t5_encoder", 60), ("enct5", 60)]
)
def test_of_a_long_text_a_model_reads_as_many_tokens_as_it_has_positions(family, tokens, tmp_path):
    model = saved(tmp_path, family)
    ids = torch.tensor([tokenizer()(LONG)["input_ids"][:tokens]])

    actual = probabilities(tmp_path, LONG)

    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].softmax(-1)
    assert actual == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_model_that_cannot_tell_the_texts_of_a_pair_apart_reads_them_without_types(tmp_path):
    config = BertConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, type_vocab_size=1, max_position_embeddings=32,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    pairs = tokenizer()
    pairs.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    pairs.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", pair="$A $B:1", special_tokens=[]
    )
    pairs.save_pretrained(tmp_path)

    assert sum(probabilities(tmp_path, "w3 w9\tw5")) == pytest.approx(1.0, abs=1e-5)


def test_a_decoder_with_a_graph_beside_its_weights_continues_a_text(tmp_path):
    saved(tmp_path, "llama")
    (tmp_path / onnx.MODEL).write_bytes(b"")

    (answer,) = answers_of(tmp_path, ["w3 w9"], new_tokens=3)

    assert len(answer["text"].split()) <= 3


def test_a_prompt_does_not_end_with_the_token_that_ends_a_document(tmp_path):
    model = saved(tmp_path, "llama")
    ends = tokenizer()
    ends.eos_token = "w2"  # noqa: S105  (no password)
    ends.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A w2", special_tokens=[("w2", 2)]
    )
    ends.save_pretrained(tmp_path)

    (answer,) = answers_of(tmp_path, ["w30 w40"], new_tokens=4)

    given = torch.tensor([[30, 40]])
    tokens = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=4)
    assert answer["text"] == ends.decode(tokens[0, 2:], skip_special_tokens=True)


def test_a_text_is_the_greedy_one_whatever_the_model_would_generate_with(tmp_path):
    saved(tmp_path, "llama")
    (plain,) = answers_of(tmp_path, ["w30 w40"], new_tokens=8)
    settings = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0, "num_beams": 2}
    GenerationConfig(**settings, eos_token_id=99, pad_token_id=0).save_pretrained(tmp_path)

    (answer,) = answers_of(tmp_path, ["w30 w40"], new_tokens=8)

    assert answer == plain
    assert len({*plain["text"].split()}) < 8  # a penalty would forbid the repetition


def test_a_masked_model_fills_masks_with_readable_tokens_and_refuses_a_text_without(tmp_path):
    model = tiny_cuts.build("bert", "mlm")
    model.save_pretrained(tmp_path)
    masked = tokenizer()
    masked.mask_token = "w9"  # noqa: S105  (no password)
    masked.save_pretrained(tmp_path)

    (answer,) = answers_of(tmp_path, [f"w30 {masked.mask_token} w40"])

    ids = torch.tensor([masked(f"w30 {masked.mask_token} w40")["input_ids"]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, ids[0].tolist().index(masked.mask_token_id)]
    assert answer["tokens"] == [[masked.decode([token]) for token in logits.topk(5).indices]]
    with pytest.raises(DataError, match=r"the text 'w30 w40' has no .* where a token is to be"):
        list(answers_of(tmp_path, ["w30 w40"]))


@pytest.mark.parametrize(
    ("text", "new_tokens", "message"),
    [("", 3, "prompt 0 has no tokens"), (LONG, 3, "60 tokens"), ("w3", 40, "max_new_tokens 40")],
)
def test_a_prompt_without_tokens_or_room_is_told_before_any_answer(
    tmp_path, text, new_tokens, message
):
    saved(tmp_path, "gpt2")

    with pytest.raises(DataError, match=message):
        list(answers_of(tmp_path, [text], new_tokens=new_tokens))


CHANGES = {
    "no class": {"architectures": ["AutoModelForSequenceClassification"]},
    "no mask": {"architectures": ["BertForMaskedLM"]},
    "several labels": {"problem_type": "multi_label_classification"},
    "quantised": {"quantization_config": {"quant_method": "gptq"}},
}


def broken(folder: Path, kind: str) -> Path:
    """Return a folder that gives no answers."""
    saved(folder / "final")
    final, config = folder / "final", folder / "final" / "config.json"
    if kind == "a run":
        return folder
    if kind == "no model type":
        config.write_text("{}")
    if kind == "no weights":
        (final / "model.safetensors").unlink()
    if kind in CHANGES:
        config.write_text(json.dumps(json.loads(config.read_text()) | CHANGES[kind]))
    if kind == "no padding":
        words = json.loads((final / "tokenizer_config.json").read_text())
        del words["pad_token"]
        (final / "tokenizer_config.json").write_text(json.dumps(words))
    return final


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a run", r"config\.json does not exist; give .*final"),
        ("no model type", r"config\.json cannot be read: Unrecognized model"),
        ("no weights", r"cannot be loaded: .*model\.safetensors"),
        ("quantised", r"is quantized \(gptq\)"),
        ("no class", r"names the architecture 'AutoModelForSequenceClassification', which neither"),
        ("no mask", r"the tokenizer has no mask token to fill"),
        ("no padding", r"the tokenizer has no pad token, which texts of several lengths need"),
        ("several labels", r"decides on each label alone"),
    ],
)
def test_a_folder_without_a_model_that_answers_is_refused(tmp_path, kind, message):
    folder = broken(tmp_path, kind)

    with pytest.raises(ModelError, match=message) as failed:
        list(answers_of(folder, ["w3"]))

    assert "\n" not in str(failed.value)


def test_a_graph_alone_needs_its_runtime(tmp_path, monkeypatch):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / onnx.MODEL)
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"needs onnxruntime, not installed"):
        list(answers_of(tmp_path, ["w3"]))


@pytest.mark.parametrize(
    "family",
    [
        one if one == "bert" else pytest.param(one, marks=pytest.mark.slow)
        for one in tiny_cuts.FAMILIES
    ],
)
def test_a_graph_of_a_cut_gives_the_logits_of_torch_at_any_size(family, tmp_path):
    whole = tiny_cuts.build(family)
    view = tiny_cuts.view_of(whole, "ragged")
    model = tiny_cuts.cut(whole, tiny_cuts.task_of(family), view, tiny_cuts.order_of(whole))
    model.save_pretrained(tmp_path)
    tiny_cuts.tokenizer().save_pretrained(tmp_path)

    assert onnx.write_onnx(tmp_path) <= 1e-4

    graph = onnx.OnnxModel(tmp_path / onnx.MODEL)
    ids = torch.arange(24).reshape(4, 6) + 2
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2] * 2)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
    got = torch.from_numpy(graph.logits(inputs))
    if wanted.ndim == 3:
        wanted, got = wanted[mask.bool()], got[mask.bool()]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_graph_that_onnxruntime_cannot_open_is_refused(monkeypatch, tmp_path):
    tiny_cuts.build("bert").save_pretrained(tmp_path)
    monkeypatch.setattr(onnx, "_export", lambda model, names, graph: graph.write_bytes(b"none"))
    with pytest.raises(ModelError, match=r"onnxruntime cannot run the graph of this bert model \("):
        onnx.write_onnx(tmp_path)


@pytest.mark.parametrize(("logit", "difference"), [(np.nan, "nan"), (1e4, r"1\.0e\+04")])
def test_a_graph_that_computes_something_else_is_refused(monkeypatch, tmp_path, logit, difference):
    model = tiny_cuts.build("bert")
    model.save_pretrained(tmp_path)

    class Broken:
        inputs = ("input_ids", "attention_mask")

        def __init__(self, graph):
            del graph

        def logits(self, inputs):
            return np.full((len(inputs["input_ids"]), model.config.num_labels), logit)

    monkeypatch.setattr(onnx, "_export", lambda *_: None)
    monkeypatch.setattr(onnx, "OnnxModel", Broken)
    with pytest.raises(ModelError, match=f"they differ by {difference}"):
        onnx.write_onnx(tmp_path)
    monkeypatch.setattr(onnx, "_differences", lambda *_: (0.01, 2.0))
    with pytest.raises(ModelError, match=r"they differ by 1\.0e-02"):
        onnx.write_onnx(tmp_path)
