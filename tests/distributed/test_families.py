"""Every shape of model trains sharded as it does whole: fused, normed and tied parts, experts."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from equal_runs import ZERO3, difference, zero
from slow_cases import slow
from tiny_runs import NO_DROPOUT, llama, run_in, write_jsonl
from torch import Tensor, nn

from megakd.engine.initialize import frozen_engine
from megakd.engine.memory import destroy


class Mixture(nn.Module):
    """A block whose experts are modules; a token's expert is its first number."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        answer = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mine = tokens[:, 0] == number
            if mine.any():
                answer[mine] = expert(tokens[mine])
        return answer


def farthest_from_whole() -> float:
    """The largest error of a sharded block, each rank using the expert of its own number."""
    torch.manual_seed(0)
    whole = Mixture()
    sharded = nn.Sequential(copy.deepcopy(whole))
    tokens = torch.rand(3, 4)
    tokens[:, 0] = dist.get_rank()
    engine = frozen_engine(sharded, ds=ZERO3, dtype="fp32", rows=3)
    with torch.no_grad():
        error = max((engine(tokens) - whole(tokens)).abs().max().item() for _ in range(3))
    destroy(engine)
    return error


TIMEOUT_S = 120
STEPS = 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DECODER = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
GEMMA = {**DECODER, "head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 6}
GPT2 = {"n_head": 2, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = {"num_heads": 4, "d_kv": 6, "d_ff": 32, "dropout_rate": 0.0}
# What is there beside depth and width.
FAMILIES = {
    "gemma2": {**GEMMA, "final_logit_softcapping": 0.5},
    "gemma3_text": GEMMA,
    "phi": {**DECODER, "num_attention_heads": 2, "num_key_value_heads": 1},
    "phi3": DECODER,
    "granite": {**DECODER, "logits_scaling": 0.5},
    "qwen3": {**DECODER, "head_dim": 6},
    "gpt2": GPT2,
    "t5_encoder": T5,
    "enct5": {**T5, "feed_forward_proj": "gated-gelu"},
}
EXPERTS = {"num_experts_per_tok": 2, "initializer_range": 0.5}
TEACHERS = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 6},
}

ENCODER = {
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
ENCODERS = ("modernbert", "deberta-v2", "mpnet")
# Families outside the table; their losses have no relations.
FOUND = {
    "olmo2": {},
    "smollm3": {},
    "cohere2": {"sliding_window": 5, "logit_scale": 0.5},
    "exaone4": {"sliding_window": 5},
    "glm4": {"head_dim": 8},
    "lfm2": {"full_attn_idxs": [1]},
    "gpt_neox": {},
    "modernbert": {"local_attention": 6},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], **NO_DROPOUT},
    "mpnet": NO_DROPOUT,
}


def quick_of(families, *quick):
    return [*quick, *slow(*(family for family in families if family not in quick))]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Documents of random letters, so that no two rows choose the same experts."""
    folder = tmp_path_factory.mktemp("families")
    rng = random.Random(0)
    for split, count in {"train": 40, "validation": 9}.items():
        rows = (
            {"text": "".join(rng.choices(LETTERS, k=rng.randint(3, 40))), "label": number % 2}
            for number in range(count)
        )
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


LOGITS = [{"loss": "soft_target_kl", "temperature": 2.0}, {"loss": "hard_cross_entropy"}]
LAYERS = [
    {"loss": "hidden_mse", "layer_mapping": ["1:2", "2:3"]},
    {"loss": "relation_kl", "layer_mapping": ["2:3"], "relation_heads": 2},
]
TOKENIZERS = {"causal_lm": "bpe", "mlm": "wordpiece", "classification": "wordpiece"}


@pytest.fixture
def whole_and_sharded(workers, data, tmp_path):
    """Train on one rank, and sharded on two; both begin with equal weights."""

    def both(teacher, student, task, *, objective, steps=STEPS):
        results = []
        tokenizer = {"type": TOKENIZERS[task], "vocab_size": 300}
        for ranks, stage in ((1, 0), (2, 3)):
            path = run_in(
                tmp_path / str(ranks),
                {"type": task, "dataset": str(data), "tokenizer": tokenizer},
                teacher={"model": teacher, "deepspeed": zero(stage)},
                student={"model": student, "deepspeed": zero(stage)},
                method={"name": "single"},
                objective=objective,
                train={
                    "per_device_train_batch_size": 6 // ranks,
                    "max_steps": 100,
                    "learning_rate": 0.05,
                    "adam_epsilon": 0.01,
                    "gradient_checkpointing": stage == 3 and "mpnet" not in str(student),
                },
            )
            results += workers(ranks).run("train", str(path), [], steps, timeout_s=TIMEOUT_S)[:1]
        whole, sharded = results
        assert difference(sharded["initial"], whole["initial"]) == 0
        return whole, sharded

    return both


def assert_same(whole, sharded):
    for step in range(STEPS):
        assert sharded["losses"][step] == pytest.approx(whole["losses"][step], rel=1e-4)
    torch.testing.assert_close(sharded["final"], whole["final"], rtol=1e-5, atol=1e-5)
    assert sharded["scores"] == pytest.approx(whole["scores"], rel=1e-4)


def models_of(family, keys, *layers):
    """Teacher and student: models of so many layers."""
    keys = {**keys, "model_type": family}
    return [{"config": {**keys, "num_hidden_layers": n, "hidden_size": 8 * n}} for n in layers]


@pytest.mark.parametrize("family", quick_of(FAMILIES, "phi3"))
def test_a_family_trains_sharded_as_it_does_whole(whole_and_sharded, family):
    task = "classification" if family in ("t5_encoder", "enct5") else "causal_lm"

    models = models_of(family, FAMILIES[family], 3, 2)
    whole, sharded = whole_and_sharded(*models, task, objective=[*LOGITS, *LAYERS])

    assert_same(whole, sharded)
    moved = [n for n, v in whole["initial"].items() if (whole["final"][n] != v).any()]
    assert len(moved) > 0.9 * len(whole["initial"])


@pytest.mark.parametrize("family", quick_of(TEACHERS, "gpt_oss"))
def test_a_teacher_with_experts_teaches_sharded_as_it_does_whole(whole_and_sharded, family):
    """The tokens of the ranks choose different experts."""
    keys = {**DECODER, "intermediate_size": 16, **EXPERTS, **TEACHERS[family]}
    teacher, *_ = models_of(family, keys, 3)
    objective = [*LOGITS, *LAYERS]

    assert_same(*whole_and_sharded(teacher, llama(2), "causal_lm", objective=objective))


@pytest.mark.parametrize("family", quick_of(FOUND, "modernbert"))
def test_a_family_outside_the_table_has_the_losses_of_one_process(whole_and_sharded, family):
    task = "mlm" if family in ENCODERS else "causal_lm"
    usual = DECODER if task == "causal_lm" and family != "gpt_neox" else ENCODER
    objective = [*LOGITS, {"loss": "hidden_mse", "layer_mapping": ["1:2", "2:4"]}]

    models = models_of(family, {**usual, **FOUND[family]}, 4, 2)
    whole, sharded = whole_and_sharded(*models, task, objective=objective, steps=3)

    for ours, theirs in zip(sharded["losses"], whole["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_experts_that_are_modules_are_gathered_as_one_block(workers):
    """Gathered one by one, the ranks wait for each other until the time limit."""
    errors = workers(2).run("test_families.farthest_from_whole", timeout_s=TIMEOUT_S)

    assert max(errors) < 1e-6
