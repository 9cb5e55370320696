"""DeepSpeed configs: where they come from, what they may not say, what megakd adds."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from typing import Any

import pytest

from megakd.config import deepspeed as ds_config
from megakd.config.deepspeed import (
    check_frozen_stage,
    frozen_ds_config,
    load_ds_config,
    merged_ds_config,
    preset_names,
    shards_within_node,
    zero_stage,
)
from megakd.config.file import load_config
from megakd.config.train import TrainConfig
from megakd.errors import ConfigError

PRESETS = {
    "zero0": 0,
    "zero1": 1,
    "auto": 2,
    "zero2": 2,
    "zero2_offload": 2,
    "zero3": 3,
    "zero3_offload": 3,
    "teacher_zero0": 0,
    "teacher_zero3": 3,
    "teacher_zero3_node": 3,
    "teacher_zero3_offload": 3,
}
WHERE = "student.deepspeed"
TEACHER, NODE = "teacher.deepspeed", "teacher_zero3_node"


def message_of(spec: Any, where: str = WHERE) -> str:
    with pytest.raises(ConfigError) as caught:
        load_ds_config(spec, where=where)
    return str(caught.value)


@pytest.mark.parametrize(("name", "stage"), PRESETS.items())
def test_a_preset_has_the_stage_its_name_says(name, stage):
    assert zero_stage(load_ds_config(name, where=WHERE)) == stage


def test_the_presets_are_those_that_are_documented():
    assert preset_names() == sorted(PRESETS)


@pytest.mark.parametrize("name", [name for name in PRESETS if "offload" in name])
def test_an_offload_preset_offloads_what_its_model_has(name):
    zero = load_ds_config(name, where=WHERE)["zero_optimization"]

    offloaded = {key for key in zero if key.startswith("offload_")}
    expected = {
        "zero2_offload": {"offload_optimizer"},
        "zero3_offload": {"offload_optimizer", "offload_param"},
        "teacher_zero3_offload": {"offload_param"},
    }
    assert offloaded == expected[name]
    assert all(zero[key]["device"] == "cpu" for key in offloaded)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_stage_0_and_3_alone_serve_a_frozen_model(name):
    where, stage = "teacher.deepspeed", PRESETS[name]
    refused = pytest.raises(ConfigError, match=rf"^{where}: ZeRO stage {stage} ")

    with nullcontext() if stage in (0, 3) else refused:
        check_frozen_stage(load_ds_config(name, where=where), where=where)


@pytest.mark.parametrize("name", PRESETS)
def test_deepspeed_accepts_every_preset(name):
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    zero = load_ds_config(name, where=WHERE)["zero_optimization"]

    assert config.DeepSpeedZeroConfig(**zero).stage == PRESETS[name]


def test_presets_of_an_installed_package_are_found_inside_it(tmp_path, monkeypatch):
    (tmp_path / "megakd" / "ds_configs").mkdir(parents=True)
    (tmp_path / "megakd" / "ds_configs" / "mine.json").write_text("{}")
    monkeypatch.setattr(ds_config, "__file__", str(tmp_path / "megakd" / "config" / "deepspeed.py"))

    assert preset_names() == ["mine"]
    assert load_ds_config("mine", where=WHERE) == {}


def test_a_path_and_an_inline_mapping_mean_the_same(tmp_path):
    inline = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(inline))

    assert load_ds_config(str(path), where=WHERE) == load_ds_config(inline, where=WHERE) == inline


def test_an_inline_mapping_is_left_as_it_was():
    inline = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}

    loaded = load_ds_config(inline, where=WHERE)
    loaded["zero_optimization"]["offload_param"]["device"] = "none"
    frozen_ds_config(inline, dtype="bf16", micro_batch=1)["zero_optimization"].clear()

    assert inline == {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}


def test_an_unknown_preset_names_the_nearest_and_all():
    message = message_of("zero_2")

    assert message.startswith('student.deepspeed: unknown preset "zero_2"; did you mean "zero2"?')
    assert "teacher_zero3_offload" in message


@pytest.mark.parametrize("spec", ["mine.json", "some/where", "~/nowhere.json"])
def test_a_path_that_does_not_exist_is_named(spec):
    assert message_of(spec) == f"student.deepspeed: the DeepSpeed config {spec} does not exist"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,}', "is not JSON: line 1, column"),
        (b'{"zero_optimization": {"stage": 1, "stage": 2}}', 'contains the key "stage" twice'),
        (b'{"a": "\xff"}', "is not UTF-8 text (byte 7)"),
        (b"[]", "mine.json: must be a mapping (got [])"),
    ],
    ids=["broken", "twice", "latin-1", "list"],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_bytes(content)

    assert message in message_of(str(path))


@pytest.mark.parametrize(
    ("key", "value", "owner"),
    [
        ("train_batch_size", 8, "train.per_device_train_batch_size"),
        ("train_micro_batch_size_per_gpu", 8, "train.per_device_train_batch_size"),
        ("elasticity", {"enabled": True}, "train.per_device_train_batch_size"),
        ("gradient_accumulation_steps", 1, "train.gradient_accumulation_steps"),
        ("managed_gradient_accumulation", False, "train.gradient_accumulation_steps"),
        ("gradient_clipping", 1.0, "train.max_grad_norm"),
        ("lr", 1e-4, "train.learning_rate"),
        ("optimizer", {"type": "AdamW", "params": {"lr": "auto"}}, "train.learning_rate"),
        ("scheduler", {"type": "WarmupLR"}, "train.lr_scheduler_type"),
        ("bf16", {"enabled": True}, "train.bf16"),
        ("fp16", {"enabled": "auto", "loss_scale": 0}, "train.fp16"),
        ("amp", {"enabled": True}, "train.bf16"),
        ("torch_autocast", {"enabled": True}, "train.bf16"),
        ("bf16", {}, "train.bf16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_knob_of_the_run_config_is_refused_naming_its_owner(key, value, owner):
    expected = (
        f'sets "{key}", which megakd takes from {owner}; remove the key there and set {owner}'
    )

    assert message_of({key: value}) == f"student.deepspeed {expected}"


@pytest.mark.parametrize(
    ("where", "key", "owner"),
    [
        ("teacher.deepspeed", "bf16", "teacher.dtype"),
        ("teachers[1].deepspeed", "fp16", "teachers[1].dtype"),
        ("teacher.deepspeed", "gradient_clipping", "train.max_grad_norm"),
        ("teacher.finetune.deepspeed", "bf16", "teacher.finetune.bf16"),
        ("teacher.finetune.deepspeed", "optimizer", "teacher.finetune.learning_rate"),
    ],
)
def test_the_owner_depends_on_whose_config_it_is(where, key, owner):
    assert f"which megakd takes from {owner};" in message_of({key: 1}, where)


def test_the_file_that_sets_a_knob_is_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"gradient_clipping": 0.5}')

    assert message_of(str(path)).startswith('student.deepspeed: mine.json sets "gradient_clipping"')


def test_parameter_dtype_belongs_to_the_run_config():
    message = message_of({"data_types": {"param_dtype": "bf16"}})

    assert 'sets "data_types.param_dtype", which megakd takes from train.bf16' in message


def test_knobs_left_to_the_trainer_are_left_out():
    spec = {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True},
    }

    loaded = load_ds_config(spec, where=WHERE)

    assert loaded == {"zero_optimization": {"stage": 3, "overlap_comm": True}}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"zero_optimization.stage": 2},
            'DeepSpeed does not support the dotted key "zero_optimization.stage"; write '
            '{"zero_optimization": {"stage": …}}',
        ),
        ({"zero_optimization": {"offload_param.device": "cpu"}}, 'key "offload_param.device"'),
        ({"zero_optimisation": {}}, 'unknown key "zero_optimisation"; did you mean "zero_optimiz'),
        ({"gradient_cliping": 1}, 'unknown key "gradient_cliping"; did you mean "gradient_clipp'),
        ({"wall_clock_breakdown": "auto"}, 'wall_clock_breakdown cannot be "auto"'),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op cannot be "sum", because losses'),
        ({"zero_optimization": True}, "zero_optimization must be a mapping (got true)"),
        ({"zero_optimization": {"stage": 4}}, "stage must be 0, 1, 2 or 3 (got 4)"),
        ({"zero_optimization": {"stage": "3"}}, 'stage must be 0, 1, 2 or 3 (got "3")'),
        ({"zero_optimization": {"stage": True}}, "stage must be 0, 1, 2 or 3 (got true)"),
        ({"zero_optimization": {"stage": "auto"}}, 'stage must be 0, 1, 2 or 3 (got "auto")'),
        (
            {"zero_optimization": {"stage3_param_persistance_threshold": 0}},
            'unknown key "stage3_param_persistance_threshold"; did you mean '
            '"stage3_param_persistence_threshold"?',
        ),
        ({"zero_optimization": {"qqq": 0}}, 'unknown key "qqq"; known: allgather_bucket_size, '),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param needs ZeRO stage 3 or above, and the stage is 2",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer needs ZeRO stage 1 or above, and the stage is 0",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
            'offload_param.device must be "none" or "cpu" (got "disk")',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            'offload_optimizer.device must be "none" or "cpu" (got "nvme"); NVMe has never been',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"super_offload": True}}},
            "offload_optimizer.super_offload cannot be true, because this has never been tried",
        ),
        (
            {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
            'zero_optimization.zenflow cannot be {"topk_ratio": 0.1}, because this has never',
        ),
        (
            {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}},
            "zero_optimization.elastic_checkpoint cannot be true, because a run could not continue",
        ),
        (
            {"zero_optimization": {"stage": 2, "load_from_fp32_weights": False}},
            "zero_optimization.load_from_fp32_weights cannot be false, because a run could not",
        ),
        ({"checkpoint": {"load_universal": True}}, 'checkpoint cannot be {"load_universal": true}'),
        (
            {"checkpoint": {"writer": {"type": "fast"}}},
            "a run could not continue from a checkpoint",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            'offload_param: unknown key "devise"; did you mean "device"?',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": "cpu"}},
            'offload_param must be a mapping (got "cpu")',
        ),
    ],
)
def test_what_deepspeed_would_ignore_or_refuse_later_is_refused(spec, message):
    text = message_of(spec)

    assert text.startswith("student.deepspeed: ")
    assert message in text


def test_offload_to_nowhere_asks_for_no_stage():
    spec = {"zero_optimization": {"stage": 0, "offload_param": {"device": "none"}}}

    assert load_ds_config(spec, where=WHERE) == spec


def test_the_known_keys_are_those_of_the_installed_deepspeed():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero import config, offload_config

    models = {
        "zero": (config.DeepSpeedZeroConfig, ds_config._KEYS["zero_optimization"]),
        "offload_param": (
            offload_config.DeepSpeedZeroOffloadParamConfig,
            ds_config._KEYS["offload_param"],
        ),
        "offload_optimizer": (
            offload_config.DeepSpeedZeroOffloadOptimizerConfig,
            ds_config._KEYS["offload_optimizer"],
        ),
    }

    assert {name: field_names(model) for name, (model, _) in models.items()} == {
        name: known for name, (_, known) in models.items()
    }


def field_names(model: Any) -> set[str]:
    fields = model.model_fields.items()
    current = {n: f for n, f in fields if not (f.json_schema_extra or {}).get("deprecated")}
    return set(current) | {field.alias for field in current.values() if field.alias}


@pytest.mark.parametrize("clipping", [0.0, 0.5])
def test_a_training_engine_gets_what_the_run_config_owns(clipping):
    train = TrainConfig(
        per_device_train_batch_size=4, gradient_accumulation_steps=7, max_grad_norm=clipping
    )

    merged = merged_ds_config(
        load_ds_config("zero2", where=WHERE), train, dtype="bf16", world_size=3
    )

    assert merged.pop("zero_optimization")["stage"] == 2
    assert merged.pop("steps_per_print") >= 10**9
    assert merged == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clipping,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("fp32", {}), ("bf16", {"bf16": {"enabled": True}}), ("fp16", {"fp16": {"enabled": True}})],
)
def test_precision_follows_the_dtype(dtype, precision):
    merged = merged_ds_config({}, TrainConfig(), dtype=dtype, world_size=1)
    frozen = frozen_ds_config({}, dtype=dtype, micro_batch=1)

    for config in (merged, frozen):
        assert {k: v for k, v in config.items() if k in ("bf16", "fp16")} == precision


def test_a_line_every_few_steps_can_be_asked_for():
    merged = merged_ds_config({"steps_per_print": 5}, TrainConfig(), dtype="fp32", world_size=1)

    assert merged["steps_per_print"] == 5


def test_a_second_shard_group_has_to_divide_the_ranks():
    ds = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}

    assert merged_ds_config(ds, TrainConfig(), dtype="fp32", world_size=4)
    with pytest.raises(ConfigError, match="zero_hpz_partition_size 2 does not divide the 3 ranks"):
        merged_ds_config(ds, TrainConfig(), dtype="fp32", world_size=3)


def test_a_frozen_engine_has_no_optimizer_and_no_clipping():
    ds = load_ds_config("zero3_offload", where="teacher.deepspeed")

    frozen = frozen_ds_config(ds, dtype="fp32", micro_batch=2)

    zero = frozen.pop("zero_optimization")
    assert "offload_optimizer" not in zero
    assert zero["offload_param"]["device"] == "cpu"
    assert math.isclose(frozen.pop("gradient_clipping"), 0)
    assert frozen == {
        "steps_per_print": 10**9,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
    }


@pytest.mark.parametrize("stage", [1, 2])
def test_a_frozen_engine_at_stage_1_or_2_is_refused_naming_0_and_3(stage):
    message = (
        f"teacher.deepspeed: ZeRO stage {stage} shards gradients and optimizer state, and a frozen "
        "model has neither; use stage 0 (teacher_zero0, a copy per rank) or 3 (teacher_zero3, "
        "sharded)"
    )

    with pytest.raises(ConfigError, match=re.escape(message)):
        frozen_ds_config({"zero_optimization": {"stage": stage}}, dtype="fp32", micro_batch=1)


def test_a_frozen_engine_cannot_shard_a_second_time():
    ds = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}

    with pytest.raises(ConfigError, match="cannot use zero_hpz_partition_size without an optimiz"):
        frozen_ds_config(ds, dtype="fp32", micro_batch=1)


def test_a_config_without_a_zero_section_is_stage_0():
    assert zero_stage({}) == 0


@pytest.mark.parametrize(
    ("stage", "dtype", "accumulates"),
    [(0, "bf16", None), (1, "bf16", None), (2, "bf16", "fp32"), (3, "fp16", "fp32")]
    + [(stage, "fp32", None) for stage in range(4)],
)
def test_16_bit_gradients_add_up_in_fp32_where_deepspeed_can(stage, dtype, accumulates):
    ds = {"zero_optimization": {"stage": stage}}

    merged = merged_ds_config(ds, TrainConfig(), dtype=dtype, world_size=1)

    assert merged.get("data_types", {}).get("grad_accum_dtype") == accumulates


def test_a_file_may_name_another_dtype_for_gradients():
    ds = {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}

    merged = merged_ds_config(ds, TrainConfig(), dtype="bf16", world_size=1)

    assert merged["data_types"] == {"grad_accum_dtype": "bf16"}


def test_auto_in_a_nested_section_is_left_out():
    offload = {"device": "cpu", "pin_memory": "auto", "buffer_count": "auto"}
    spec = {"zero_optimization": {"stage": 2, "offload_optimizer": offload}}

    zero = load_ds_config(spec, where=WHERE)["zero_optimization"]

    assert zero == {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def test_a_whole_number_may_be_written_with_an_exponent():
    spec = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}

    assert load_ds_config(spec, where=WHERE) == spec


@pytest.mark.parametrize("value", ["4", None, True, 1.5, -1, math.inf, math.nan, [4]])
def test_a_size_that_is_not_a_whole_number_is_refused_with_its_key(value):
    zero = {"stage": 3, "zero_hpz_partition_size": value}
    offload = {"stage": 3, "offload_param": {"device": "cpu", "buffer_count": value}}

    messages = [message_of({"zero_optimization": it}) for it in (zero, offload)]

    said = f"must be a whole number, 0 or above (got {json.dumps(value)})"
    assert messages == [
        f"{WHERE}: zero_optimization.zero_hpz_partition_size {said}",
        f"{WHERE}: zero_optimization.offload_param.buffer_count {said}",
    ]


def test_the_presets_send_gradients_during_the_backward_at_stage_3_alone():
    """`tests/distributed/test_overlap.py` and docs/two-models.md say why."""
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    presets = {name: load_ds_config(name, where=WHERE) for name in preset_names()}

    overlapping = {
        name
        for name, ds in presets.items()
        if config.DeepSpeedZeroConfig(**ds["zero_optimization"]).overlap_comm
    }

    assert overlapping == {name for name, ds in presets.items() if zero_stage(ds) == 3}


def test_overlap_that_gives_wrong_gradients_is_refused():
    refused, accepted = (
        {"zero_optimization": {"stage": stage, "overlap_comm": True}} for stage in (1, 2)
    )

    said = "zero_optimization.overlap_comm: true can give wrong gradients at ZeRO stage 1, because"
    assert message_of(refused).startswith(f"{WHERE}: {said}")
    assert load_ds_config(accepted, where=WHERE) == accepted


def test_the_keys_with_whole_numbers_are_those_of_the_installed_deepspeed():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero import config, offload_config

    models = (
        config.DeepSpeedZeroConfig,
        offload_config.DeepSpeedZeroOffloadParamConfig,
        offload_config.DeepSpeedZeroOffloadOptimizerConfig,
    )
    whole = {
        key
        for model in models
        for name, field in model.model_fields.items()
        for key in (name, field.alias)
        if field.annotation is int and key is not None
    }

    assert whole == ds_config._WHOLE


def within(value: Any, stage: int = 3) -> dict[str, Any]:
    section = {"shard_within_node": value}
    return {"megakd": section, "zero_optimization": {"stage": stage}}


def test_the_preset_is_teacher_zero3_with_the_key():
    node, everywhere = (load_ds_config(name, where=TEACHER) for name in (NODE, "teacher_zero3"))

    assert shards_within_node(node)
    assert not shards_within_node(everywhere)
    assert node.pop("megakd") == {"shard_within_node": True}
    assert node == everywhere


def test_deepspeed_gets_no_key_of_megakd():
    ds = load_ds_config(NODE, where=TEACHER)
    unused = load_ds_config(within(value=False), where="student.deepspeed")

    check_frozen_stage(ds, where=TEACHER)
    assert "megakd" not in frozen_ds_config(ds, dtype="bf16", micro_batch=1)
    assert "megakd" not in merged_ds_config(unused, TrainConfig(), dtype="fp32", world_size=1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"megakd": True}, "megakd must be a mapping (got true)"),
        ({"megakd": {"shard_in_node": True}}, 'megakd: unknown key "shard_in_node"; did you mean'),
        ({"megkd": {}}, 'unknown key "megkd"; did you mean "megakd"?'),
        (within("yes"), 'megakd.shard_within_node must be true or false (got "yes")'),
        (within(value=True, stage=0), "needs ZeRO stage 3, which shards the weights, and the st"),
    ],
)
def test_a_section_that_cannot_be_meant_is_refused(spec, message):
    with pytest.raises(ConfigError) as caught:
        load_ds_config(spec, where=TEACHER)

    assert message in str(caught.value)


@pytest.mark.parametrize("where", ["student.deepspeed", "teacher.finetune.deepspeed"])
def test_a_model_that_learns_cannot_be_sharded_within_nodes(run_file, where):
    message = f"{where}: megakd.shard_within_node works only for a frozen model"

    with pytest.raises(ConfigError, match=message):
        load_config(run_file, [f"{where}={NODE}"])
    with pytest.raises(ConfigError, match="works only for a frozen model"):
        merged_ds_config(within(value=True), TrainConfig(), dtype="fp32", world_size=2)
    assert load_config(run_file, [f"teacher.deepspeed={NODE}"])
