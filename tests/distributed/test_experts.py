"""Teachers with experts at ZeRO 3: the tokens of the ranks choose different experts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_runs import config_tree, llama, write_config, write_jsonl

TIMEOUT_S = 120
STEPS = 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
TEACHER = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.5,
}
TEACHERS = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 16, "head_dim": 6},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Documents of random letters, so that no two rows choose the same experts."""
    folder = tmp_path_factory.mktemp("experts")
    rng = random.Random(0)
    for split, count in {"train": 40, "validation": 9}.items():
        rows = ({"text": "".join(rng.choices(LETTERS, k=rng.randint(3, 40)))} for _ in range(count))
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def test_experts_that_are_modules_are_gathered_as_one_block(workers):
    """Gathered one by one, the ranks wait for each other until the time limit."""
    errors = workers(2).run("expert_cases.farthest_from_whole", timeout_s=TIMEOUT_S)

    assert max(errors) < 1e-6


@pytest.mark.parametrize("family", TEACHERS)
def test_a_teacher_with_experts_teaches_sharded_as_it_does_whole(workers, data, tmp_path, family):
    found = []
    for ranks, stage in ((1, 0), (2, 3)):
        ds = ZERO3 if stage == 3 else {"zero_optimization": {"stage": 0}}
        tree = config_tree(
            tmp_path / str(ranks),
            {
                "type": "causal_lm",
                "dataset": str(data),
                "tokenizer": {"type": "bpe", "vocab_size": 300},
            },
            teacher={
                "model": {"config": {"model_type": family, **TEACHER, **TEACHERS[family]}},
                "deepspeed": ds,
            },
            student={"model": llama(2), "deepspeed": ds},
            method={"name": "single"},
            objective=[
                {"loss": "soft_target_kl"},
                {"loss": "hard_cross_entropy"},
                {"loss": "hidden_mse", "layer_mapping": ["1:1", "2:2"]},
                {"loss": "relation_kl", "layer_mapping": ["2:2"], "relation_heads": 2},
            ],
            train={"per_device_train_batch_size": 6 // ranks, "max_steps": 100},
        )
        path = write_config(tmp_path / f"{ranks}.yaml", tree)
        found.append(workers(ranks).run("train", str(path), [], STEPS, timeout_s=TIMEOUT_S)[0])

    whole, sharded = found
    for step in range(STEPS):
        assert sharded["losses"][step] == pytest.approx(whole["losses"][step], rel=1e-4)
    for name, weight in whole["final"].items():
        assert torch.allclose(sharded["final"][name], weight, atol=1e-5), name
