"""Tiny models of every family that can be cut, with random weights, and references for cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cut_families import FAMILIES as CUT_FAMILIES
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from megakd.config.task import TaskConfig
from megakd.models.architectures import register_own_models
from megakd.models.cutting import cut_config, cut_state, rescaled, reshape_folder
from megakd.models.elastic import weight_axes
from megakd.models.fitting import ModelSource
from megakd.models.layers import RemainingLayers
from megakd.models.loading import load_model, resolve_model
from megakd.models.model_folder import ModelContent, write_model_folder
from megakd.models.small_copy import new_model
from megakd.models.structure import architecture_of
from megakd.models.views import UnitOrder, View

register_own_models()
VOCABULARY = 60
LABELS = ("no", "yes", "perhaps")
AUTO = {
    "classification": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}


def _sized(family: str, **keys: Any) -> dict[str, Any]:
    """Three layers; heads as wide as no other number, so that no dimension is mistaken."""
    entry = CUT_FAMILIES[family]
    sizes = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 6}
    sizes[entry.neurons] = 20
    return {**sizes, "vocab_size": VOCABULARY, **keys}


LONG = {"max_position_embeddings": 32}
GROUPED = {**LONG, "num_key_value_heads": 3}
GEMMA = {**GROUPED, "head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 9}
KEYS = {
    "bert": LONG,
    "roberta": LONG,
    "distilbert": LONG,
    "electra": {**LONG, "embedding_size": 16},
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 6},
    "gemma2": {
        **GEMMA,
        "final_logit_softcapping": 1.5,
        "attn_logit_softcapping": 0.5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma3_text": {
        **GEMMA,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi": GROUPED,
    "granite": {**GROUPED, "logits_scaling": 0.4, "embedding_multiplier": 1.5},
    "gpt2": {"n_positions": 32, "bos_token_id": 0, "eos_token_id": 1},
    "t5_encoder": {"d_kv": 4, "num_decoder_layers": 3, "feed_forward_proj": "relu"},
    "enct5": {"d_kv": 4, "feed_forward_proj": "gated-gelu"},
}
FAMILIES = {family: _sized(family, **keys) for family, keys in KEYS.items()}
DECODERS = tuple(name for name in FAMILIES if "causal_lm" in CUT_FAMILIES[name].tasks)
MASKED = ("bert", "roberta", "distilbert", "electra")
T5S = ("t5_encoder", "enct5")
CUTTABLE = tuple(name for name in FAMILIES if name not in T5S)


def task_of(family: str) -> str:
    """The task that a family's models of these tests have a head for."""
    return "causal_lm" if family in DECODERS else "classification"


def task(kind: str = "classification") -> TaskConfig:
    return TaskConfig(type=kind, dataset="d", max_length=16)


def build(family: str, kind: str | None = None, **changes) -> PreTrainedModel:
    """Random values everywhere, biases and norms included, so that no default passes."""
    keys = {**FAMILIES[family], **changes}
    kind = kind or task_of(family)
    if kind == "classification":
        keys["id2label"] = dict(enumerate(LABELS))
        keys["label2id"] = {name: number for number, name in enumerate(LABELS)}
    model = AUTO[kind].from_config(CONFIG_MAPPING[family](**keys)).eval()
    model.config.architectures = [type(model).__name__]
    return randomised(model)


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with other weights, equal at every call."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per number, as many as the models have."""
    table = {f"w{number}": number for number in range(VOCABULARY)}
    whole = Tokenizer(models.WordLevel(table, unk_token="w0"))  # noqa: S106  (no password)
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="w0", pad_token="w1")  # noqa: S106


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def source_of(folder: Path, kind: str) -> ModelSource:
    return resolve_model(str(folder), task(kind), where="teacher.model")


def loaded(
    model: Path | ModelSource, kind: str, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    return load_model(
        source_of(model, kind) if isinstance(model, Path) else model,
        task=task(kind),
        label_names=labels_of(kind),
        tokenizer_size=VOCABULARY,
        ds=None,
        dtype=dtype,
        seed=1,
        need_head=True,
    ).eval()


def labels_of(kind: str) -> tuple[str, ...]:
    return LABELS if kind == "classification" else ()


def reshaped(source: ModelSource, folder: Path, kind: str = "classification", **changes) -> Path:
    """The folder of a cut or sorted model, made from file to file."""
    facts = {"task": task(kind), "label_names": labels_of(kind), "tokenizer": tokenizer()}
    reshape_folder(source, folder, **facts, **changes)
    return folder


def written(model: PreTrainedModel, folder: Path, **changes) -> Path:
    facts = {"state": iter(model.state_dict().items()), "tokenizer": tokenizer(), **changes}
    facts["architecture"] = type(model).__name__
    write_model_folder(folder, ModelContent(model.config, **facts))
    return folder


def full_view(model: PreTrainedModel) -> View:
    return architecture_of(model.config).units(model.config)


def view_of(model: PreTrainedModel, kind: str) -> View:
    """A view by its kind: uniform, ragged, empty (layers without anything), full."""
    full = full_view(model)
    heads, neurons = len(full.heads), len(full.neurons)
    most = full.heads[0]
    if kind == "uniform":
        return View((2,) * heads, (8,) * neurons)
    if kind == "ragged":
        return View((1, most, 2, 1, 2)[:heads], (7, 20, 1, 3)[:neurons])
    if kind == "empty":
        return View((0, 2, 1, 0, 2)[:heads], (5, 0, 9, 4)[:neurons])
    return full


def order_of(model: PreTrainedModel, *, seed: int = 0) -> UnitOrder:
    full, generator = full_view(model), torch.Generator().manual_seed(seed)

    def shuffled(count: int) -> tuple[int, ...]:
        return tuple(torch.randperm(count, generator=generator).tolist())

    return UnitOrder(tuple(map(shuffled, full.heads)), tuple(map(shuffled, full.neurons)))


def cut(
    model: PreTrainedModel,
    kind: str,
    view: View,
    order: UnitOrder | None = None,
    *,
    learns: bool = False,
):
    made = new_model(cut_config(model.config, view, order, learns=learns), kind).eval()
    state = cut_state(model.state_dict().items(), weight_axes(model), view, order)
    state = state if learns else rescaled(state, model.config, view)
    made.load_state_dict(
        dict(RemainingLayers(model.config, view.layers).select(state)), strict=True
    )
    made.tie_weights()
    return made


def logits(model: PreTrainedModel, **options) -> Tensor:
    """Return the logits of two texts, of which one is padded."""
    ids = torch.arange(2, 26).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.inference_mode():
        result = model(input_ids=ids, attention_mask=mask, **options).logits
    # A masked position of a language model says nothing of interest.
    return result if result.dim() == 2 else result[mask.bool()]
