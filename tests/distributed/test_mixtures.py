"""A mixture of experts learns alike on one rank and on two, at every ZeRO stage."""

from __future__ import annotations

import random
import re

import pytest
import torch
from equal_runs import difference, zero
from slow_cases import slow
from test_families import LETTERS, LOGITS, TIMEOUT_S, assert_same
from tiny_mixtures import FAMILIES, keys_of, write_mixture
from tiny_runs import llama, run_in, write_jsonl


@pytest.fixture
def texts():
    rng = random.Random(0)
    return ["".join(rng.choices(LETTERS, k=rng.randint(3, 40))) for _ in range(49)]


@pytest.fixture
def on_one_and_two(workers, texts, tmp_path):
    """Train a student on one rank whole, and on two at a ZeRO stage; rows of different lengths."""
    for split, rows in {"train": texts[:40], "validation": texts[40:]}.items():
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", ({"text": text} for text in rows))
    tokenizer = {"type": "bpe", "vocab_size": 300}

    def both(student, stage, **sections):
        results = []
        scratch = {} if "lora" in sections else {"tokenizer": tokenizer}
        for ranks, at in ((1, 0), (2, stage)):
            path = run_in(
                tmp_path / str(ranks),
                {"type": "causal_lm", "dataset": str(tmp_path / "data"), **scratch},
                teacher={"model": llama(2), "deepspeed": zero(at // 3 * 3)},
                student={"model": student, "deepspeed": zero(at), **sections},
                method={"name": "single"},
                objective=LOGITS,
                train={
                    "per_device_train_batch_size": 8 // ranks,
                    "max_steps": 100,
                    "learning_rate": 0.05,
                    "adam_epsilon": 0.01,
                    "gradient_checkpointing": at == 3,
                },
            )
            results += workers(ranks).run("train", str(path), [], 2, timeout_s=TIMEOUT_S)[:1]
        one, two = results
        assert difference(two["initial"], one["initial"]) == 0
        assert_same(one, two)
        return one, {n for n, v in one["initial"].items() if (one["final"][n] != v).any()}

    return both


CASES = [("mixtral", 2), *slow(*((family, 3) for family in FAMILIES), ("olmoe", 0), ("olmoe", 1))]


@pytest.mark.parametrize(("family", "stage"), CASES)
def test_a_mixture_learns_on_two_ranks_as_on_one(on_one_and_two, family, stage):
    result, moved = on_one_and_two({"config": keys_of(family)}, stage)

    routed = {n for n in result["initial"] if re.search("experts|gate|router", n)}
    assert routed - moved == {n for n in routed if n.endswith("e_score_correction_bias")}
    has_balance = "router_aux_loss_coef" in FAMILIES[family]
    assert ("router_balance" in result["losses"][0]) == has_balance


@pytest.mark.slow
def test_adapters_of_a_mixture_learn_on_two_ranks_as_on_one(on_one_and_two, texts, tmp_path):
    """Experts and routers stay; the loss of the routers reaches the adapters before them."""
    student = write_mixture(tmp_path / "student", "qwen3_moe", texts)

    result, moved = on_one_and_two(str(student), 3, lora={"r": 2})

    assert moved
    assert all("lora_" in name for name in moved)
    first, second = (losses["router_balance"] for losses in result["losses"])
    assert first != second


@pytest.mark.slow
def test_two_sharded_ranks_keep_and_train_the_experts_of_one(workers, texts, tmp_path):
    """Ranks read other rows, and a sharded model gathers all experts of a layer together."""
    teacher = write_mixture(tmp_path / "teacher", "qwen3_moe", texts)
    rows = [{"text": text} for text in texts]
    data = [write_jsonl(tmp_path / "data" / f"{n}.jsonl", rows) for n in ("train", "validation")]

    def shrunk(ranks):
        config = run_in(
            tmp_path / str(ranks),
            {"type": "causal_lm", "dataset": str(data[0].parent)},
            teacher={"model": str(teacher), "deepspeed": zero(0 if ranks == 1 else 3)},
            student={"model": "from_teacher", "deepspeed": zero(0 if ranks == 1 else 3)},
            method={"name": "shrink", "parameters": 18_000},
            train={"per_device_train_batch_size": 6 // ranks, "adam_epsilon": 0.01, "max_steps": 2},
        )
        return workers(ranks).run("test_shrink.shrink", str(config), [], timeout_s=TIMEOUT_S)

    (one,) = shrunk(1)

    for rank in shrunk(2):
        assert rank["state"].keys() == one["state"].keys()
        for name, weight in one["state"].items():
            torch.testing.assert_close(rank["state"][name], weight, atol=1e-4, rtol=1e-3)
    experts = {name for name in one["state"] if ".experts." in name}
    assert 0 < len(experts) < 2 * 8 * 3
