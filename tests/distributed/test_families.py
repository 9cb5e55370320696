"""Every shape of model trains sharded as it does whole: fused, normed and tied parts, decoders."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml

STEPS = 2
WORDS = ("the", "red", "green", "dog", "cat", "runs", "sees", "over", "house", "slowly")
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
QWEN3 = {
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
GPT2 = {
    "model_type": "gpt2",
    "n_head": 2,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
T5 = {"num_heads": 4, "d_kv": 6, "d_ff": 32, "dropout_rate": 0.0}
DECODER = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
GEMMA = {**DECODER, "head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 6}
DEPTH, WIDTH = "num_hidden_layers", "hidden_size"
# Keys that all layers share, then the names of depth and width.
FAMILIES = {
    "gemma2": ({**GEMMA, "model_type": "gemma2", "final_logit_softcapping": 0.5}, DEPTH, WIDTH),
    "gemma3_text": ({**GEMMA, "model_type": "gemma3_text"}, DEPTH, WIDTH),
    "phi": (
        {**DECODER, "model_type": "phi", "num_attention_heads": 2, "num_key_value_heads": 1},
        *(DEPTH, WIDTH),
    ),
    "phi3": ({**DECODER, "model_type": "phi3"}, DEPTH, WIDTH),
    "granite": ({**DECODER, "model_type": "granite", "logits_scaling": 0.5}, DEPTH, WIDTH),
    "qwen3": (QWEN3, "num_hidden_layers", "hidden_size"),
    "gpt2": (GPT2, "n_layer", "n_embd"),
    "t5_encoder": ({**T5, "model_type": "t5_encoder"}, "num_layers", "d_model"),
    "enct5": (
        {**T5, "model_type": "enct5", "feed_forward_proj": "gated-gelu"},
        "num_layers",
        "d_model",
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    rng = random.Random(0)
    for split, count in {"train": 40, "validation": 9}.items():
        rows = [
            {"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 20))), "label": number % 2}
            for number in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def config_tree(data: Path, out: Path, family: str, *, stage: int) -> dict:
    keys, depth, width = FAMILIES[family]
    is_language = family not in ("t5_encoder", "enct5")
    ds = ZERO3 if stage == 3 else {"zero_optimization": {"stage": stage}}
    frozen = ZERO3 if stage == 3 else {"zero_optimization": {"stage": 0}}
    return {
        "output_dir": str(out),
        "task": {
            "type": "causal_lm" if is_language else "classification",
            "dataset": str(data),
            "max_length": 16,
            "tokenizer": {"type": "bpe" if is_language else "unigram", "vocab_size": 300},
        },
        "teacher": {"model": {"config": {**keys, depth: 3, width: 24}}, "deepspeed": frozen},
        "student": {"model": {"config": {**keys, depth: 2, width: 16}}, "deepspeed": ds},
        "method": {"name": "single"},
        "objective": [
            {"loss": "soft_target_kl", "temperature": 2.0},
            {"loss": "hard_cross_entropy"},
            {"loss": "hidden_mse", "layer_mapping": ["1:2", "2:3"]},
            {"loss": "relation_kl", "layer_mapping": ["2:3"], "relation_heads": 2},
        ],
        "train": {
            "per_device_train_batch_size": 3 if stage == 3 else 6,
            "max_steps": 100,
            "learning_rate": 0.05,
            "adam_epsilon": 0.01,
            "gradient_checkpointing": stage == 3,
        },
    }


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("qwen3", marks=pytest.mark.slow),
        "gemma2",
        "phi3",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in ("gemma3_text", "phi", "granite")
        ),
        "gpt2",
        pytest.param("t5_encoder", marks=pytest.mark.slow),
        "enct5",
    ],
)
def test_a_family_trains_sharded_as_it_does_whole(workers, data, tmp_path, family):
    found = []
    for ranks, stage in ((1, 0), (2, 3)):
        tree = config_tree(data, tmp_path / str(stage), family, stage=stage)
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(tree))
        found.append(workers(ranks).run("train", str(path), [], STEPS)[0])

    whole, sharded = found
    assert all(torch.equal(sharded["initial"][name], v) for name, v in whole["initial"].items())
    for step in range(STEPS):
        assert sharded["losses"][step] == pytest.approx(whole["losses"][step], rel=1e-4)
    for name, weight in whole["final"].items():
        assert torch.allclose(sharded["final"][name], weight, atol=1e-5), name
    moved = [n for n, v in whole["initial"].items() if (whole["final"][n] != v).any()]
    assert len(moved) > 0.9 * len(whole["initial"])
