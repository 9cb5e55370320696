"""Families of decoders, as entries of the table of families.

The entries follow the modelling files of transformers, one module for each family.
"""

from __future__ import annotations

from dataclasses import replace

from megakd.models.architecture import Architecture, LogitKeys
from megakd.models.given_paths import ATTENTION_OF_LLAMA, AttentionPaths, FeedForwardPaths

HEAD_NORMS = ATTENTION_OF_LLAMA._replace(norms=("self_attn.q_norm", "self_attn.k_norm"))
ROUTES_TOKENS = "a router chooses the experts of each token"


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


def _gpt2() -> Architecture:
    return replace(
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
    )


def _phi() -> Architecture:
    return replace(
        _decoder("phi"),
        final_norm="final_layernorm",
        attention=ATTENTION_OF_LLAMA._replace(output="self_attn.dense"),
        feed_forward=FeedForwardPaths(("mlp.fc1",), "mlp.fc2"),
    )


def _phi3() -> Architecture:
    joint = "self_attn.qkv_proj"
    return replace(
        _decoder("phi3"),
        attention=ATTENTION_OF_LLAMA._replace(projections=(joint, joint, joint)),
        feed_forward=FeedForwardPaths(("mlp.gate_up_proj",), "mlp.down_proj"),
        uncut="one matrix makes queries, keys and values, and another one gates and neurons",
    )


def _gpt_oss() -> Architecture:
    return replace(
        _decoder("gpt_oss"),
        has_sinks=True,
        masks_documents=False,
        rotary_form="half_width",
        experts="mlp",
        uncut=ROUTES_TOKENS,
    )


def _qwen3_moe() -> Architecture:
    return replace(
        _decoder("qwen3_moe"),
        attention=HEAD_NORMS,
        neurons="moe_intermediate_size",
        experts="mlp",
        uncut=ROUTES_TOKENS,
    )


DECODERS = (
    _decoder("llama"),
    _decoder("mistral"),
    _decoder("qwen2"),
    replace(_decoder("qwen3"), attention=HEAD_NORMS),
    replace(
        _decoder("gemma2"),
        logits=LogitKeys(softcap="final_logit_softcapping"),
        score_softcap="attn_logit_softcapping",
    ),
    replace(
        _decoder("gemma3_text"),
        attention=HEAD_NORMS,
        norms_by_head=True,
        logits=LogitKeys(softcap="final_logit_softcapping"),
    ),
    _phi(),
    _phi3(),
    replace(_decoder("granite"), logits=LogitKeys(divisor="logits_scaling")),
    _gpt_oss(),
    _qwen3_moe(),
    _gpt2(),
)
