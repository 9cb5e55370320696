"""Tiny models of every family, saved as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cut_families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from megakd.config.sections import ScratchModel
from megakd.config.task import TaskConfig
from megakd.models.architectures import register_own_models
from megakd.models.fitting import ModelSource
from megakd.models.loading import load_model, resolve_model

register_own_models()
DECODERS = (
    *(name for name, entry in FAMILIES.items() if "causal_lm" in entry.tasks),
    *("phi3", "gpt_oss", "qwen3_moe"),  # outside of the table
)
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "vocab_size": 300,
}
T5 = {"d_model": 16, "num_layers": 2, "num_heads": 4, "d_kv": 6, "d_ff": 32, "vocab_size": 300}
DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 300}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32, "vocab_size": 300}
# Caps and windows so small that they change the outputs of these models.
GEMMA = {**TINY, "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 9}
EXPERTS = {**TINY, "num_experts_per_tok": 2}
OTHERS = {
    "gemma2": {**GEMMA, "final_logit_softcapping": 1.5, "attn_logit_softcapping": 0.5},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**TINY, "pad_token_id": 0, "sliding_window": 5},
    "granite": {**TINY, "logits_scaling": 0.4, "embedding_multiplier": 1.5},
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "head_dim": 12, "sliding_window": 5},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32},
    "distilbert": {**DISTILBERT, "max_position_embeddings": 64},
    # Heads wider than their share of the layers, fewer columns than the layers are wide.
    "qwen3": {**TINY, "head_dim": 12},
    "gpt2": {**GPT2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1},
    "t5_encoder": {**T5, "feed_forward_proj": "relu"},
    "enct5": {**T5, "feed_forward_proj": "gated-gelu"},
}


class TinyModels:
    """Saves and loads two-layer models under one temporary folder."""

    vocabulary = 300
    input_ids = torch.arange(2, 26).reshape(2, 12)

    def __init__(self, root: Path) -> None:
        self.folder = root / "model"

    def keys(self, model_type: str) -> dict:
        keys = OTHERS.get(model_type, TINY)
        has_groups = model_type in DECODERS and model_type != "gpt2"
        return {**keys, "num_key_value_heads": 1} if has_groups else dict(keys)

    def save(self, model_type: str, auto=None, **changes) -> Path:
        """Random values everywhere, biases and norms included, so that no default passes."""
        config = CONFIG_MAPPING[model_type](**{**self.keys(model_type), **changes})
        stock = AutoModelForSequenceClassification
        stock = AutoModelForCausalLM if model_type in DECODERS else stock
        model = (auto or stock).from_config(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.save_pretrained(self.folder)
        return self.folder

    def rewrite(self, change) -> None:
        """Replace the weights of the saved folder by `change(tensors)`."""
        file = self.folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    def rewrite_config(self, **keys) -> None:
        file = self.folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))

    def scratch(self, model_type: str, **changes) -> ScratchModel:
        return ScratchModel(config={"model_type": model_type, **self.keys(model_type), **changes})

    def task(self, kind: str = "classification", **changes) -> TaskConfig:
        return TaskConfig(type=kind, dataset="d", **{"max_length": 32, **changes})

    def task_for(self, model_type: str) -> TaskConfig:
        return self.task("causal_lm" if model_type in DECODERS else "classification")

    def resolve(self, spec, task: TaskConfig, where: str = "teacher.model", **flags) -> ModelSource:
        spec = str(spec) if isinstance(spec, Path) else spec
        return resolve_model(spec, task, where=where, **flags)

    def load(self, spec, task: TaskConfig, **changes) -> PreTrainedModel:
        """Loads for evaluation what `spec` names, in fp32 unless told otherwise."""
        facts = {
            "label_names": (),
            "tokenizer_size": self.vocabulary,
            "ds": None,
            "dtype": torch.float32,
            "seed": 1,
            "need_head": True,
        }
        source = spec if isinstance(spec, ModelSource) else self.resolve(spec, task)
        return load_model(source, task=task, **{**facts, **changes}).eval()


@pytest.fixture
def tiny(tmp_path) -> TinyModels:
    return TinyModels(tmp_path)
