"""Frozen teachers whose weights are stored in fewer bits."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch
from transformers import AutoModelForCausalLM

from megakd.contract.batch import Batch
from megakd.errors import ModelError
from megakd.models import quantized
from megakd.models.knowledge import Needs, read_knowledge
from megakd.models.quantized import check_quantized

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
ZERO_3 = {"zero_optimization": {"stage": 3}}


@pytest.fixture
def stored(tiny):
    """The folder of a model whose config says that it is quantized."""
    folder = tiny.save("llama")
    tiny.rewrite_config(quantization_config=FP8)
    return folder


def test_a_quantized_model_is_a_frozen_teacher_or_refused(tiny, stored):
    source = tiny.resolve(stored, tiny.task("causal_lm"))

    check_quantized(source, None, is_frozen=True)
    with pytest.raises(ModelError, match=r"is quantized \(fp8\), and its weights cannot"):
        check_quantized(source, None, is_frozen=False)


def test_zero_3_is_refused_saying_what_to_use(tiny, stored):
    source = tiny.resolve(stored, tiny.task("causal_lm"))

    with pytest.raises(ModelError, match=r"teacher\.deepspeed to a .* as teacher_zero0"):
        check_quantized(source, ZERO_3, is_frozen=True)


def test_a_missing_package_is_named(tiny, stored, monkeypatch):
    tiny.rewrite_config(quantization_config={"quant_method": "gptq", "bits": 4})
    monkeypatch.setattr(quantized, "find_spec", lambda _: None)
    source = tiny.resolve(stored, tiny.task("causal_lm"))

    with pytest.raises(ModelError, match=r"\(gptq\), for which .* the package gptqmodel; install"):
        check_quantized(source, None, is_frozen=True)


def test_weights_of_eight_bits_give_the_logits_of_transformers(tiny):
    """Needs compressed-tensors."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    scheme = import_module("compressed_tensors.quantization")
    model = AutoModelForCausalLM.from_pretrained(tiny.save("llama", hidden_size=32))
    weights = scheme.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    group = scheme.QuantizationScheme(targets=["Linear"], weights=weights)
    settings = scheme.QuantizationConfig(
        config_groups={"all": group}, ignore=["lm_head"], quantization_status="frozen"
    )
    scheme.apply_quantization_config(model, settings)
    for part in model.modules():
        if hasattr(part, "weight_scale"):
            part.weight_scale.data = part.weight.abs().amax(1, keepdim=True) / 127
    compressor = import_module("compressed_tensors").ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tiny.folder)
    compressor.update_config(tiny.folder)
    expected = AutoModelForCausalLM.from_pretrained(tiny.folder)(tiny.input_ids).logits

    loaded = tiny.load(tiny.folder, tiny.task("causal_lm"))
    ids = tiny.input_ids
    batch = Batch({"input_ids": ids}, ids, torch.ones_like(ids, dtype=torch.bool))
    read = read_knowledge(loaded, batch, Needs((1,)))
    with read.head.open():
        logits = read.hidden @ read.head.read()[0].T

    keys = json.loads((tiny.folder / "config.json").read_text())
    assert keys["quantization_config"]["quant_method"] == "compressed-tensors"
    torch.testing.assert_close(logits, expected)
