"""Whole runs across families: trained, distilled, exported, and loaded by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from tiny_runs import BAD, GOOD, OTHER, review_task, text_task
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from whole_run import finish_in, read, records

from megakd.models.modeling.modeling_t5 import T5EncoderForSequenceClassification

RELATIONS = {"loss": "relation_kl", "relation_heads": 2, "layer_mapping": ["1:2"]}


def qwen3(layers: int) -> dict:
    keys = {"num_hidden_layers": layers, "hidden_size": 24, "intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return {"config": {"model_type": "qwen3", "max_position_embeddings": 32, **keys, **heads}}


def gpt2(layers: int) -> dict:
    keys = {"n_layer": layers, "n_embd": 16, "n_head": 2, "n_positions": 32}
    return {"config": {"model_type": "gpt2", **keys}}


def test_a_gpt2_learns_from_a_qwen3(one_rank, tmp_path):
    finish_in(
        one_rank,
        tmp_path,
        text_task(tmp_path),
        teacher={"model": qwen3(2), "finetune": {"max_steps": 8}, "deepspeed": "teacher_zero3"},
        student={"model": gpt2(1), "deepspeed": "zero3"},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}, RELATIONS],
        train={"max_steps": 8},
    )

    logged = [r for r in records(tmp_path / "out", "student") if "train/loss" in r]
    assert logged[-1]["train/soft_target_kl"] < logged[0]["train/soft_target_kl"]
    assert 1 < read(tmp_path / "out")["student.perplexity"] < 320
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    assert model.config.model_type == "gpt2"
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = AutoTokenizer.from_pretrained(tmp_path / "out" / "final")("the cat", return_tensors="pt")
    assert model(**ids).logits.isfinite().all()
    # The tokenizer of the data has no pad token, and the export invents none.
    assert (model.config.bos_token_id, model.config.pad_token_id) == (None, None)
    assert model.generation_config.pad_token_id is None


def published_t5(folder: Path) -> Path:
    """A T5 with its SentencePiece model, as its authors left it."""
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2}
    T5ForConditionalGeneration(T5Config(**shape, vocab_size=256)).save_pretrained(folder)
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([GOOD, BAD, OTHER] * 20),
            model_writer=file,
            **{"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2, **ids},
        )
    return folder


@pytest.fixture(scope="module")
def t5_run(one_rank, tmp_path_factory) -> Path:
    """One published T5 read as both: the teacher with a decoder, the student without."""
    folder = tmp_path_factory.mktemp("t5")
    t5, hidden = {"model": str(published_t5(folder / "t5"))}, {"loss": "hidden_mse", "weight": 0.1}
    finish_in(
        one_rank,
        folder,
        review_task(folder),
        teacher={**t5, "finetune": {"max_steps": 30}, "deepspeed": "teacher_zero3"},
        student={**t5, "architecture": "t5_encoder", "deepspeed": "zero3"},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}, {**hidden, "layer_mapping": ["2:2"]}, RELATIONS],
        train={"max_steps": 30, "per_device_train_batch_size": 8},
    )
    return folder


def test_both_readings_of_a_published_t5_learn(t5_run):
    report = read(t5_run / "out")
    assert report["teacher.accuracy"] > 0.7
    assert report["student.accuracy"] > 0.7
    # The student has no decoder, and as large an encoder.
    assert report["student.parameters"] < report["teacher.parameters"]
    assert report["student.encoder_parameters"] == report["teacher.encoder_parameters"]


def test_an_exported_t5_encoder_brings_its_class_along(t5_run):
    final = t5_run / "out" / "final"
    config = json.loads((final / "config.json").read_text())
    auto_map = config["auto_map"]["AutoModelForSequenceClassification"]

    assert config["model_type"] == "t5_encoder"
    foreign = get_class_from_dynamic_module(auto_map, str(final))
    assert foreign.__module__.startswith("transformers_modules")
    model, loading = foreign.from_pretrained(final, output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(final, trust_remote_code=True)
    text = tokenizer("a good film", return_tensors="pt")
    assert text["input_ids"][0, -1] == 1
    ours = T5EncoderForSequenceClassification.from_pretrained(final)
    assert torch.equal(model(**text).logits, ours(**text).logits)
