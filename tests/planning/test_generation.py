"""The plan of a run that generates texts: the cache of keys and values, and the gathered model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from planned_runs import CAUSAL, config_of, plan_of
from tiny_runs import llama
from transformers import CONFIG_MAPPING, AutoConfig, DynamicCache, LlamaForCausalLM

from megakd.contract.tasks import STUDENT
from megakd.planning.memory import Share
from megakd.planning.plan import Plan, cached_numbers


def planned(folder: Path, *overrides: str) -> Plan:
    config = config_of(
        folder,
        *overrides,
        task={**CAUSAL, "max_length": 32},
        teacher={"model": llama(3, width=32, vocab_size=64), "deepspeed": "teacher_zero0"},
        student={"model": llama(2, vocab_size=64), "deepspeed": "zero0"},
        objective=[{"loss": "soft_target_kl"}],
        train={"per_device_train_batch_size": 2},
    )
    return plan_of(config)


@pytest.mark.parametrize("key_heads", [1, 4])
def test_the_cache_of_a_token_has_the_counted_numbers(key_heads):
    keys = llama(3, width=32, vocab_size=64, num_key_value_heads=key_heads)["config"]
    config = AutoConfig.for_model(**{**keys, "num_attention_heads": 4})
    cache = DynamicCache()

    LlamaForCausalLM(config)(torch.zeros(2, 5, dtype=torch.long), None, None, cache)

    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)  # type: ignore[union-attr]
    assert held == 2 * 5 * cached_numbers(config)


def test_many_texts_at_once_raise_the_peak_and_are_named(tmp_path):
    few = planned(tmp_path, "rollout={max_new_tokens: 8}")
    many = planned(
        tmp_path,
        "rollout={max_new_tokens: 8, rows_per_call: 65536}",
        "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=32768",
    )

    assert many.peak_bytes_per_rank > 65536 * 32 * 64  # more than a byte per cached number
    assert many.highest.peak.when.startswith("generating texts (rollout.rows_per")
    assert few.highest.peak.when != many.highest.peak.when


@pytest.mark.parametrize(("preset", "copies"), [("zero3", 1), ("zero2", 0)])
def test_only_a_sharded_student_is_gathered_whole_to_generate(tmp_path, preset, copies):
    plan = planned(
        tmp_path, f"student.deepspeed={preset}", "eval.generation={max_new_tokens: 8, rows: 65536}",
        "eval.generation.rows_per_call=65536",
    )  # fmt: skip
    keys = llama(2, vocab_size=64)["config"]
    model = LlamaForCausalLM(AutoConfig.for_model(**keys))

    peak = plan.highest.peak

    assert "evaluating on texts" in peak.when
    size = 2 * sum(parameter.numel() for parameter in model.parameters())  # in bf16
    assert peak.shares.get(Share(STUDENT, "gather"), 0) == copies * size


def test_texts_that_a_server_generates_take_no_memory(tmp_path):
    keys, steps = "max_new_tokens: 8", "train.gradient_accumulation_steps=32768"
    server = "{url: ['http://a:1'], model: m, push: full, folder: w}"
    ours = planned(tmp_path, f"rollout={{{keys}, rows_per_call: 65536}}", steps)
    theirs = planned(tmp_path, f"rollout={{{keys}, server: {server}}}", steps)
    plain = planned(tmp_path, steps)

    assert theirs.peak_bytes_per_rank < ours.peak_bytes_per_rank // 2
    assert theirs.peak_bytes_per_rank == pytest.approx(plain.peak_bytes_per_rank, rel=0.5)


def test_a_served_teacher_takes_no_memory(tmp_path):
    big = tmp_path / "big"
    big.mkdir()
    shape = llama(3, width=32, vocab_size=64)["config"]
    (big / "config.json").write_text(json.dumps(shape))
    loaded, served = (
        planned(tmp_path, f"teacher={{model: {big}, {keys}}}")
        for keys in (
            "deepspeed: teacher_zero0",
            "server: {url: ['http://a:1']}",
        )
    )

    assert loaded.part("teacher", "weights") > 0
    assert served.part("teacher", "weights") == 0
    assert served.peak_bytes_per_rank < loaded.peak_bytes_per_rank


def test_the_cache_of_layers_that_differ_in_heads_is_planned():
    """Gemma 4 has fewer key heads in its global layers, and a recurrent model has none."""
    keys = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    gemma = CONFIG_MAPPING["gemma4_unified_text"](
        **keys, num_key_value_heads=2, num_global_key_value_heads=1, attention_k_eq_v=True
    )

    assert cached_numbers(gemma) == 2 * 2 * 64
    assert cached_numbers(CONFIG_MAPPING["rwkv"](hidden_size=64, num_hidden_layers=2)) == 2 * 2 * 64
