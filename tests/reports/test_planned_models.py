"""Plans of several teachers, adapters and generated texts, before any model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_runs import CAUSAL, config_of, plan_of, sent, trained
from tiny_runs import bert, llama
from transformers import CONFIG_MAPPING, AutoConfig, DynamicCache, LlamaForCausalLM

from megakd.config.task import STUDENT
from megakd.reports.plan import Plan, cached_numbers
from megakd.reports.plan_memory import Share

TEACHER = {"model": bert(3, width=32, vocab_size=64)}
DRAWN, MEAN, SINGLE = ({"name": name} for name in ("skdbert", "mean_of_teachers", "single"))
WEIGHTS, KL = Share("teacher", "weights"), [{"loss": "soft_target_kl"}]


def planned(folder: Path, names: str, method: dict[str, Any], **keys: Any) -> Plan:
    pool = [{**TEACHER, **keys, "name": name} for name in names]
    student = {"model": bert(2, width=16, vocab_size=64)}
    return plan_of(config_of(folder, teachers=pool, student=student, method=method))


def teachers(plan: Plan) -> dict[str, int]:
    return plan.as_json()["roles"]["teacher"]


def test_idle_teachers_cost_their_weights_and_a_step_that_of_one_and_a_mean_that_of_all(tmp_path):
    one, drawn, mean = (
        planned(tmp_path, names, method)
        for names, method in (("a", DRAWN), ("abc", DRAWN), ("abc", MEAN))
    )
    first, second, third = map(trained, (one, drawn, mean))

    assert teachers(drawn) == {**teachers(one), "weights": 3 * teachers(one)["weights"]}
    more = drawn.peak_bytes_per_rank - one.peak_bytes_per_rank
    assert more == 2 * teachers(one)["weights"]
    assert second.flops == pytest.approx(first.flops)
    assert sent(second, "teacher") == pytest.approx(sent(first, "teacher"))
    assert sent(third, "teacher") == pytest.approx(3 * sent(first, "teacher"))
    assert third.flops > 1.5 * first.flops


def test_of_offloaded_teachers_that_are_drawn_one_at_a_time_is_on_the_device(tmp_path):
    away = {"deepspeed": "teacher_zero3_offload"}
    here, alone = planned(tmp_path, "a", DRAWN), planned(tmp_path, "a", DRAWN, **away)
    drawn = planned(tmp_path, "abcde", DRAWN, **away)
    all_asked = planned(tmp_path, "abcde", MEAN, **away)

    assert teachers(drawn)["weights"] == teachers(here)["weights"]
    assert teachers(alone)["weights"] == teachers(all_asked)["weights"] == 0


def test_what_comes_before_the_student_is_planned_too(tmp_path):
    phases = ["a-scored", "b-scored", "student"]
    plan = planned(tmp_path, "ab", {**DRAWN, "distribution": "teacher_rank"})
    assert [phase.name for phase in plan.phases if phase.name in phases][:3] == phases


def test_a_teacher_whose_answers_are_on_disk_takes_no_memory_and_no_time(tmp_path):
    whole = trained(planned(tmp_path, "a", DRAWN))
    cached = trained(planned(tmp_path, "a", DRAWN, cache=str(tmp_path / "answers")))

    assert whole.most[WEIGHTS] > 0
    assert WEIGHTS not in cached.most
    assert cached.flops < whole.flops
    assert sent(cached, "teacher") == 0


@pytest.mark.parametrize("measures_losses", [False, True])
def test_a_teacher_fills_the_cache_once_and_stays_loaded_where_losses_are_measured(
    tmp_path, measures_losses
):
    method = {"name": "shrink", "flops": 0.3, "round_to": 8}
    teacher, student = {**TEACHER, "cache": "auto"}, {"model": "from_teacher"}
    models = {"teacher": teacher, "student": student, "method": method}
    plan = plan_of(config_of(tmp_path, **models, eval={"losses": measures_losses}))

    held = {phase.name: phase.most.get(WEIGHTS, 0) > 0 for phase in plan.phases}
    assert (held["teacher-answers"], held["student"]) == (True, measures_losses)
    assert [*held].index("teacher-answers") == [*held].index("student") - 1


@pytest.mark.parametrize(
    ("rows", "losses"),
    [({}, ["soft_target_kl", "hidden_mse"]), ({"tokens_per_rank": 128}, ["soft_target_kl"])],
)
def test_teachers_that_share_the_rows_cost_a_step_of_one(tmp_path, rows, losses):
    model = llama(2, width=16, vocab_size=500)

    def step(names: str, method: str, **keys: Any) -> Plan:
        config = config_of(
            tmp_path,
            task={**CAUSAL, "max_length": 32, **keys},
            teachers=[{"model": model, "name": name} for name in names],
            student={"model": model},
            method={"name": method},
            objective=[{"loss": loss} for loss in losses],
            train={"per_device_train_batch_size": 4, **rows},
        )
        return plan_of(config)

    one = step("a", "mean_of_teachers")
    two = step("ab", "routed", teacher_column="expert")
    mean = step("ab", "mean_of_teachers")

    assert trained(two).flops == pytest.approx(trained(one).flops, rel=0.05)
    assert trained(mean).flops > 1.3 * trained(one).flops
    assert one.peak_bytes_per_rank < two.peak_bytes_per_rank < mean.peak_bytes_per_rank


# Adapters. Llama: queries, output [W, W]; keys, values [W / 2, W]; three matrices of an MLP.
WIDTH, VOCABULARY, LAYERS, RANK = 32, 96, 2, 2
ADAPTERS = LAYERS * RANK * (2 * 2 * WIDTH + 2 * (WIDTH + WIDTH // 2) + 3 * 3 * WIDTH)
LORA = {"lora": {"r": RANK}}


def shape_in(folder: Path, scratch: dict[str, Any]) -> str:
    """A folder with the configuration of a model and without its weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(scratch["config"]))
    return str(folder)


def adapted(tmp_path: Path, student: dict[str, Any], **sections: Any) -> Plan:
    model = shape_in(tmp_path / "model", llama(LAYERS, WIDTH, vocab_size=VOCABULARY))
    train = {"per_device_train_batch_size": 1, "bf16": False}
    given = {"student": {"model": model, **student}, "method": {"name": "finetune"}, **sections}
    return plan_of(config_of(tmp_path, task=CAUSAL, train=train, **given), ranks=1)


def test_a_plan_has_moments_of_the_adapters_alone_and_the_weights_of_all(tmp_path):
    whole, result = (
        adapted(tmp_path, {"deepspeed": "zero0", **lora}).as_json()["roles"]["student"]
        for lora in ({}, LORA)
    )
    assert result["optimizer"] == 2 * 4 * ADAPTERS
    assert result["weights"] == whole["weights"] + 4 * ADAPTERS
    assert result["gradients"] < whole["gradients"] / 3


def test_a_plan_of_the_base_as_teacher_has_its_forward_and_no_second_model(tmp_path):
    base, second = (
        trained(adapted(tmp_path, LORA, teacher={"model": one}, method=SINGLE, objective=KL))
        for one in ("student_base", str(tmp_path / "model"))
    )

    assert base.most[WEIGHTS] == 0
    assert second.most[WEIGHTS] > 0
    assert base.flops == pytest.approx(second.flops, rel=0.01)


# Generated texts: the cache of keys and values, and the gathered model.


def decoders(folder: Path, *overrides: str) -> Plan:
    config = config_of(
        folder,
        *overrides,
        task={**CAUSAL, "max_length": 32},
        teacher={"model": llama(3, width=32, vocab_size=64), "deepspeed": "teacher_zero0"},
        student={"model": llama(2, vocab_size=64), "deepspeed": "zero0"},
        objective=KL,
        train={"per_device_train_batch_size": 2},
    )
    return plan_of(config)


@pytest.mark.parametrize("key_heads", [1, 4])
def test_the_cache_of_a_token_has_the_counted_numbers(key_heads):
    keys = llama(3, width=32, vocab_size=64, num_key_value_heads=key_heads)["config"]
    config = AutoConfig.for_model(**{**keys, "num_attention_heads": 4})
    cache: Any = DynamicCache()

    LlamaForCausalLM(config)(torch.zeros(2, 5, dtype=torch.long), None, None, cache)

    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held == 2 * 5 * cached_numbers(config)


def test_the_cache_of_layers_that_differ_in_heads_is_planned():
    """Gemma 4 has fewer key heads in its global layers, and a recurrent model has none."""
    keys = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    gemma = CONFIG_MAPPING["gemma4_unified_text"](
        **keys, num_key_value_heads=2, num_global_key_value_heads=1, attention_k_eq_v=True
    )

    assert cached_numbers(gemma) == 2 * 2 * 64
    assert cached_numbers(CONFIG_MAPPING["rwkv"](hidden_size=64, num_hidden_layers=2)) == 2 * 2 * 64


MANY = "train.gradient_accumulation_steps=32768"


def test_many_texts_at_once_raise_the_peak_are_named_and_take_nothing_on_a_server(tmp_path):
    keys, server = "max_new_tokens: 8", "{url: ['http://a:1'], model: m, push: full, folder: w}"
    few = decoders(tmp_path, f"rollout={{{keys}}}")
    many = decoders(tmp_path, f"rollout={{{keys}, rows_per_call: 65536}}", MANY)
    served = decoders(tmp_path, f"rollout={{{keys}, server: {server}}}", MANY)

    assert many.peak_bytes_per_rank > 65536 * 32 * 64  # more than a byte per cached number
    assert many.highest.peak.when.startswith("generating texts (rollout.rows_per")
    assert few.highest.peak.when != many.highest.peak.when
    assert served.peak_bytes_per_rank < many.peak_bytes_per_rank // 2
    plain = decoders(tmp_path, MANY).peak_bytes_per_rank
    assert served.peak_bytes_per_rank == pytest.approx(plain, rel=0.5)


@pytest.mark.parametrize(("preset", "copies"), [("zero3", 1), ("zero2", 0)])
def test_only_a_sharded_student_is_gathered_whole_to_generate(tmp_path, preset, copies):
    texts = "eval.generation={max_new_tokens: 8, rows: 65536, rows_per_call: 65536}"
    plan = decoders(tmp_path, f"student.deepspeed={preset}", texts)
    model = LlamaForCausalLM(AutoConfig.for_model(**llama(2, vocab_size=64)["config"]))

    peak = plan.highest.peak

    assert "evaluating on texts" in peak.when
    size = 2 * sum(parameter.numel() for parameter in model.parameters())  # in bf16
    assert peak.shares.get(Share(STUDENT, "gather"), 0) == copies * size


def test_a_served_teacher_takes_no_memory(tmp_path):
    big = shape_in(tmp_path / "big", llama(3, width=32, vocab_size=64))
    loaded, served = (
        decoders(tmp_path, f"teacher={{model: {big}, {keys}}}")
        for keys in ("deepspeed: teacher_zero0", "server: {url: ['http://a:1']}")
    )

    assert loaded.part("teacher", "weights") > 0
    assert served.part("teacher", "weights") == 0
    assert served.peak_bytes_per_rank < loaded.peak_bytes_per_rank


def test_a_teacher_in_fp8_has_half_the_weights_of_one_in_bf16(tmp_path):
    def plan(dtype: str, stage: str) -> dict[str, int]:
        teacher = {"model": bert(8, width=64, vocab_size=64), "dtype": dtype, "deepspeed": stage}
        student = {"model": bert(2, width=16, vocab_size=64)}
        return teachers(plan_of(config_of(tmp_path, teacher=teacher, student=student)))

    for stage in ("teacher_zero0", "teacher_zero3"):
        assert 0.5 < plan("fp8", stage)["weights"] / plan("bf16", stage)["weights"] < 0.6
