"""Frozen teachers whose weights are stored in fewer bits."""

from __future__ import annotations

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megakd.config.task import TaskConfig
from megakd.data.batch import Batch
from megakd.errors import ModelError
from megakd.models import quantized
from megakd.models.loading import load_finished
from megakd.models.modeling.modeling_t5 import (
    T5EncoderConfig,
    T5EncoderForSequenceClassification,
)
from megakd.models.outputs import Needs, read_outputs
from megakd.models.quantized import check_quantized, open_quantized

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
ZERO_3 = {"zero_optimization": {"stage": 3}}


@pytest.fixture
def stored(tiny):
    """The folder of a model whose config says that it is quantized."""
    folder = tiny.save("llama")
    tiny.rewrite_config(quantization_config=FP8)
    return folder


def test_a_quantized_model_is_a_frozen_teacher_or_refused(tiny, stored, monkeypatch):
    def check(ds=None, *, is_frozen=True):
        check_quantized(tiny.resolve(stored, tiny.task("causal_lm")), ds, is_frozen=is_frozen)

    check()
    with pytest.raises(ModelError, match=r"is quantized \(fp8\), and its weights cannot"):
        check(is_frozen=False)
    with pytest.raises(ModelError, match=r"teacher\.deepspeed to a .* as teacher_zero0"):
        check(ZERO_3)
    tiny.rewrite_config(quantization_config={"quant_method": "gptq", "bits": 4})
    monkeypatch.setattr(quantized, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"\(gptq\), for which .* the package gptqmodel; install"):
        check()


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
    read = read_outputs(loaded, batch, Needs((1,)))
    with read.head.open():
        logits = read.hidden @ read.head.read()[0].T

    keys = json.loads((tiny.folder / "config.json").read_text())
    assert keys["quantization_config"]["quant_method"] == "compressed-tensors"
    torch.testing.assert_close(logits, expected)


def test_a_family_that_casts_to_the_dtype_of_a_quantized_weight_is_refused(monkeypatch):
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5EncoderConfig(**sizes, vocab_size=512, num_labels=2)
    model = T5EncoderForSequenceClassification(config)
    for name, part in model.named_modules():
        if name.endswith(".wo"):
            part.forward = partial(torch.nn.functional.linear, weight=part.weight.detach())
            part.weight = torch.nn.Parameter(part.weight.byte(), requires_grad=False)
            part.forward = lambda hidden, forward=part.forward: forward(hidden.float())
    opened = SimpleNamespace(from_pretrained=lambda *_, **__: model)
    monkeypatch.setattr(quantized, "AUTO_CLASSES", {"classification": opened})
    facts = {"where": "teacher.model", "folder": Path("x"), "trust_remote_code": False}
    source: Any = SimpleNamespace(config=config, quantization="bitsandbytes", **facts)
    task: Any = SimpleNamespace(type="classification")

    with pytest.raises(ModelError, match=r"x is quantized .* code of a t5_encoder model reads wei"):
        open_quantized(source, task, torch.float32, torch.device("cpu"))


PARTS = {
    "self_attn.": "attn_",
    "o_proj": "output",
    "_proj": "",
    "mlp.": "ffn_",
    "lm_head": "output",
}
PARTS |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
PARTS |= {"model.layers.": "blk.", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
"""Names in transformers and in llama.cpp."""


def name_in_llama_cpp(name):
    for before, after in PARTS.items():
        name = name.replace(before, after)
    return name


def write_gguf(file, model, tokens):
    """A Llama in 8 bits as llama.cpp writes it, with a byte-level tokenizer of single letters."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_merges(["a b", "c d"])
        writer.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        values, kind = tensor, gguf.GGMLQuantizationType.Q8_0 if tensor.ndim > 1 else None
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, not halves
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        numbers = values.numpy() if kind is None else gguf.quants.quantize(values.numpy(), kind)
        writer.add_tensor(name_in_llama_cpp(name), numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def gguf_folder(tiny, tmp_path):
    """A folder with a model in a GGUF file alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny.save("llama", hidden_size=32))
    folder = tmp_path / "gguf"
    folder.mkdir()
    letters = ["<|endoftext|>", *map(chr, range(ord("!"), ord("~"))), "\u0120", "ab", "cd"]
    others = [f"<{number}>" for number in range(300 - len(letters))]
    write_gguf(folder / "model.gguf", model, [*letters, *others])
    return folder


@pytest.mark.parametrize("name", ["", "model.gguf"], ids=["folder", "file"])
def test_a_gguf_file_gives_the_logits_of_transformers(tiny, gguf_folder, name):
    expected = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="model.gguf")

    loaded = tiny.load(str(gguf_folder / name), tiny.task("causal_lm"))

    assert loaded.lm_head.weight.is_floating_point()
    ids = tiny.input_ids
    torch.testing.assert_close(loaded(ids).logits, expected(ids).logits)


def test_the_tokenizer_of_a_gguf_file_is_that_of_the_run(gguf_folder, tmp_path):
    from megakd.data.tokenizers import load_tokenizer

    task = TaskConfig(type="causal_lm", dataset="d", max_length=16)
    folders = [gguf_folder / "model.gguf"]

    tokenizer = load_tokenizer(task, None, model_folders=folders, cache_dir=tmp_path)

    assert len(tokenizer) == 300
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab d")["input_ids"]) == ["ab", "\u0120", "d"]


def refused_gguf(tiny, spec, task, ds=None, *, is_frozen=True):
    try:
        source = tiny.resolve(str(spec), tiny.task(task))
        check_quantized(source, ds, is_frozen=is_frozen)
    except ModelError as error:
        return str(error)
    return "accepted"


def test_what_a_gguf_file_cannot_be_is_one_line(tiny, gguf_folder):
    file = gguf_folder / "model.gguf"

    assert "is quantized (gguf), and ZeRO 3" in refused_gguf(tiny, file, "causal_lm", ds=ZERO_3)
    assert "cannot be trained" in refused_gguf(tiny, file, "causal_lm", is_frozen=False)
    assert "read for causal_lm alone" in refused_gguf(tiny, gguf_folder, "classification")
    with pytest.raises(ModelError, match="is a GGUF file; give the model in fp32"):
        load_finished(gguf_folder, "latency")
    (gguf_folder / "other.gguf").write_bytes(b"GGUF")
    assert "holds 2 GGUF files (model.gguf, other" in refused_gguf(tiny, gguf_folder, "causal_lm")
    assert "cannot read" in refused_gguf(tiny, gguf_folder / "other.gguf", "causal_lm")


def test_a_gguf_file_without_its_package_or_its_other_part_is_refused(tiny, tmp_path, monkeypatch):
    one = tmp_path / "model-00001-of-00002.gguf"
    one.touch()
    message = "join the parts with llama-gguf-split"
    assert message in refused_gguf(tiny, tmp_path, "causal_lm")

    one.rename(tmp_path / "model-q4.gguf")
    monkeypatch.setattr(quantized, "find_spec", lambda _: None)
    message = "is a GGUF file, for which transformers needs the package gguf; install"
    assert message in refused_gguf(tiny, tmp_path, "causal_lm")
