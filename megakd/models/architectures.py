"""Model families known to megakd. Only this table states how the families differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.activations import ACT2FN

from megakd.contract.tasks import TaskType
from megakd.errors import ModelError
from megakd.models.architecture import (
    Architecture,
    AttentionPaths,
    FeedForwardPaths,
    MaskedHead,
)

SEQUENCE_TASKS: tuple[TaskType, ...] = ("classification", "regression")
AUTO_CLASSES: Mapping[TaskType, type] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}

ATTENTION_OF_LLAMA = AttentionPaths(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj", "self_attn"
)
HEAD_NORMS = ATTENTION_OF_LLAMA._replace(norms=("self_attn.q_norm", "self_attn.k_norm"))
ROUTES_TOKENS = "a router chooses the experts of each token"

MASKED_HEADS: Mapping[str, MaskedHead] = {
    "bert": MaskedHead(
        modules=("cls",),
        transform=("cls.predictions.transform",),
        decoder="cls.predictions.decoder",
    ),
    "roberta": MaskedHead(
        modules=("lm_head",),
        transform=("lm_head.dense", ACT2FN["gelu"], "lm_head.layer_norm"),
        decoder="lm_head.decoder",
    ),
    "distilbert": MaskedHead(
        modules=("vocab_transform", "vocab_layer_norm"),
        transform=("vocab_transform", "activation", "vocab_layer_norm"),
        decoder="vocab_projector",
    ),
    # The head of the generator; a discriminator has none.
    "electra": MaskedHead(
        modules=("generator_predictions",),
        transform=("generator_predictions",),
        decoder="generator_lm_head",
    ),
}


def _encoder(model_type: str, *, renewed: tuple[str, ...] = ()) -> Architecture:
    return Architecture(
        model_type=model_type,
        tasks=(*SEQUENCE_TASKS, "mlm"),
        backbone=model_type,
        head="classifier",
        renewed=renewed,
        masked=MASKED_HEADS[model_type],
        cuts_inside_heads=True,
    )


def _attention_of_t5(module: str) -> AttentionPaths:
    return AttentionPaths((f"{module}.q", f"{module}.k", f"{module}.v"), f"{module}.o", module)


def _feed_forward_of_t5(module: str) -> FeedForwardPaths:
    return FeedForwardPaths(
        (f"{module}.wi",), f"{module}.wo", gated=(f"{module}.wi_0", f"{module}.wi_1")
    )


def _t5(model_type: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        tasks=SEQUENCE_TASKS,
        backbone="encoder",
        head="classifier",
        blocks="block",
        embeddings="embed_tokens",
        attention=_attention_of_t5("layer.0.SelfAttention"),
        feed_forward=_feed_forward_of_t5("layer.1.DenseReluDense"),
        neurons="d_ff",
        shares_bias=True,
    )


def _decoder(model_type: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        tasks=("causal_lm",),
        backbone="model",
        head="lm_head",
        blocks="layers",
        embeddings="embed_tokens",
        final_norm="norm",
        attention=ATTENTION_OF_LLAMA,
        feed_forward=FeedForwardPaths(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        rotary="rotary_emb",
    )


DECODERS = (
    _decoder("llama"),
    _decoder("mistral"),
    _decoder("qwen2"),
    replace(_decoder("qwen3"), attention=HEAD_NORMS),
    replace(
        _decoder("gemma2"),
        logit_softcap="final_logit_softcapping",
        score_softcap="attn_logit_softcapping",
    ),
    replace(
        _decoder("gemma3_text"),
        attention=HEAD_NORMS,
        norms_by_head=True,
        logit_softcap="final_logit_softcapping",
    ),
    replace(
        _decoder("phi"),
        final_norm="final_layernorm",
        attention=ATTENTION_OF_LLAMA._replace(output="self_attn.dense"),
        feed_forward=FeedForwardPaths(("mlp.fc1",), "mlp.fc2"),
    ),
    replace(
        _decoder("phi3"),
        attention=ATTENTION_OF_LLAMA._replace(projections=("self_attn.qkv_proj",) * 3),
        feed_forward=FeedForwardPaths(("mlp.gate_up_proj",), "mlp.down_proj"),
        uncut="one matrix makes queries, keys and values, and another one gates and neurons",
    ),
    replace(_decoder("granite"), logit_divisor="logits_scaling"),
    replace(
        _decoder("gpt_oss"),
        has_sinks=True,
        masks_documents=False,
        rotary_form="half_width",
        experts="mlp",
        uncut=ROUTES_TOKENS,
    ),
    replace(
        _decoder("qwen3_moe"),
        attention=HEAD_NORMS,
        neurons="moe_intermediate_size",
        experts="mlp",
        uncut=ROUTES_TOKENS,
    ),
    replace(
        _decoder("gpt2"),
        backbone="transformer",
        blocks="h",
        embeddings="wte",
        final_norm="ln_f",
        attention=AttentionPaths(
            ("attn.c_attn", "attn.c_attn", "attn.c_attn"), "attn.c_proj", "attn"
        ),
        feed_forward=FeedForwardPaths(("mlp.c_fc",), "mlp.c_proj"),
        neurons="n_inner",
        rotary=None,
    ),
)

FAMILIES: Mapping[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        _encoder("bert", renewed=("bert.pooler",)),
        _encoder("roberta"),
        replace(
            _encoder("distilbert", renewed=("pre_classifier",)),
            layers="n_layers",
            width="dim",
            attention_heads="n_heads",
            blocks="transformer.layer",
            attention=AttentionPaths(
                ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
                "attention.out_lin",
                "attention",
            ),
            feed_forward=FeedForwardPaths(("ffn.lin1",), "ffn.lin2"),
            neurons="hidden_dim",
        ),
        _encoder("electra"),
        *DECODERS,
        _t5("t5_encoder"),
        replace(
            _t5("enct5"),
            # The decoder's only token is the learned prompt.
            renewed=("decoder.embed_tokens",),
            more_attentions=(
                _attention_of_t5("decoder.block.0.layer.0.SelfAttention"),
                _attention_of_t5("decoder.block.0.layer.1.EncDecAttention"),
            ),
            more_feed_forwards=(_feed_forward_of_t5("decoder.block.0.layer.2.DenseReluDense"),),
            more_blocks=("decoder.block.0",),
        ),
    )
}
# Cut models use the entry of their family. T5 needs no cut type: its config states all shapes.
ARCHITECTURES: Mapping[str, Architecture] = {
    **FAMILIES,
    **{
        f"cut_{name}": replace(entry, model_type=f"cut_{name}")
        for name, entry in FAMILIES.items()
        if not entry.shares_bias and entry.uncut is None
    },
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return the entry of a model's family."""
    return architecture_named(config.model_type)


def architecture_named(model_type: str, task: TaskType | None = None) -> Architecture:
    """Return the entry of `model_type`, with the head of `task` if a task is given."""
    known = ", ".join(a.model_type for a in FAMILIES.values() if task in (None, *a.tasks))
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise ModelError(
            f"model_type {model_type!r} is not supported; use one of {known}{_how_to_add()}"
        )
    if task is not None and task not in architecture.tasks:
        raise ModelError(
            f"model_type {model_type!r} supports {', '.join(architecture.tasks)} and not task.type "
            f"{task}; use one of {known}"
        )
    return architecture if task is None else architecture.for_task(task)


def _how_to_add() -> str:
    needed = [field.name for field in fields(Architecture) if field.default is MISSING]
    others = [field.name for field in fields(Architecture) if field.default is not MISSING]
    return (
        f"; or add the family to FAMILIES in {__name__.replace('.', '/')}.py: an Architecture with "
        f"{', '.join(needed)}, and, where the family differs from BERT, {', '.join(others)}"
    )
