"""DeepSpeed configs: where they come from, what they may not say, what megakd adds."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from typing import Any

import pytest

from megakd.config import deepspeed as ds_config
from megakd.config.deepspeed import (
    frozen_ds_config,
    frozen_on,
    load_ds_config,
    merged_ds_config,
    preset_names,
    zero_stage,
)
from megakd.config.file import load_config
from megakd.config.sections import TrainConfig
from megakd.engine.distributed import check_zero
from megakd.errors import ConfigError

PRESETS = {
    **dict.fromkeys(("zero0", "teacher_zero0"), 0),
    "zero1": 1,
    **dict.fromkeys(("auto", "zero2", "zero2_offload"), 2),
    **dict.fromkeys(("zero3", "zero3_offload", "teacher_zero3", "teacher_zero3_node"), 3),
    "teacher_zero3_offload": 3,
}
OFFLOADED = {
    "zero2_offload": {"offload_optimizer"},
    "zero3_offload": {"offload_optimizer", "offload_param"},
    "teacher_zero3_offload": {"offload_param"},
}
WHERE = "student.deepspeed"
TEACHER, NODE = "teacher.deepspeed", "teacher_zero3_node"


def within(value: Any, stage: int = 3) -> dict[str, Any]:
    return {"megakd": {"shard_within_node": value}, **zero(stage=stage)}


NOWHERE = {"device": "none"}


def zero(**section: Any) -> dict[str, Any]:
    return {"zero_optimization": section}


def message_of(spec: Any, where: str = WHERE) -> str:
    with pytest.raises(ConfigError) as caught:
        check_zero(load_ds_config(spec, where=where), where=where)
    return str(caught.value)


def training(ds: Any, *, dtype: Any = "fp32") -> dict[str, Any]:
    """What DeepSpeed gets for a model that learns."""
    return merged_ds_config(ds, TrainConfig(), dtype=dtype)


@pytest.mark.parametrize(("name", "stage"), PRESETS.items())
def test_deepspeed_accepts_a_preset_with_the_stage_and_the_offload_of_its_name(name, stage):
    assert preset_names() == sorted(PRESETS)
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    ds = load_ds_config(name, where=TEACHER if name == NODE else WHERE)

    zero = config.DeepSpeedZeroConfig(**ds["zero_optimization"])

    assert zero_stage(ds) == zero.stage == stage
    # `tests/distributed/test_gradients.py` and docs/two-models.md say why.
    assert zero.overlap_comm == (stage == 3)
    offloads = {k: v["device"] for k, v in ds["zero_optimization"].items() if "offload_" in k}
    assert offloads == dict.fromkeys(OFFLOADED.get(name, ()), "cpu")
    refused = pytest.raises(ConfigError, match=rf"^{TEACHER}: {name}.json: ZeRO stage {stage} ")
    with nullcontext() if stage in (0, 3) else refused:
        load_ds_config(name, where=TEACHER)


def test_the_presets_of_an_installed_package_are_found_inside_it(tmp_path, monkeypatch):
    (tmp_path / "megakd" / "ds_configs").mkdir(parents=True)
    (tmp_path / "megakd" / "ds_configs" / "mine.json").write_text("{}")
    monkeypatch.setattr(ds_config, "__file__", str(tmp_path / "megakd" / "config" / "deepspeed.py"))

    assert preset_names() == ["mine"]
    assert load_ds_config("mine", where=WHERE) == {}


def test_a_path_and_an_inline_mapping_mean_the_same_and_the_mapping_is_left_as_it_was(tmp_path):
    inline = zero(stage=3, offload_param={"device": "cpu"})
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(inline))

    loaded = load_ds_config(inline, where=WHERE)
    assert load_ds_config(str(path), where=WHERE) == loaded == inline
    loaded["zero_optimization"]["offload_param"]["device"] = "none"
    frozen_ds_config(inline, dtype="bf16", micro_batch=1)["zero_optimization"].clear()

    assert inline == zero(stage=3, offload_param={"device": "cpu"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mine.json does not exist"),
        (b'{"a": 1,}', "mine.json is not JSON in UTF-8: "),
        (b'{"zero_optimization": {"stage": 1, "stage": 2}}', "a key occurs twice in a mapping"),
        (b'{"a": "\xff"}', "is not JSON in UTF-8: 'utf-8' codec can't decode byte 0xff"),
        (b"[]", "mine.json must be a mapping (got [])"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)

    assert message in message_of(str(path))


@pytest.mark.parametrize(
    ("key", "value", "owner", "where"),
    [
        ("train_micro_batch_size_per_gpu", 8, "train.per_device_train_batch_size", WHERE),
        ("gradient_accumulation_steps", 1, "train.gradient_accumulation_steps", WHERE),
        ("gradient_clipping", 1.0, "train.max_grad_norm", WHERE),
        ("lr", 1e-4, "train.learning_rate", WHERE),
        ("optimizer", {"type": "AdamW", "params": {"lr": "auto"}}, "train.learning_rate", WHERE),
        ("scheduler", {"type": "WarmupLR"}, "train.lr_scheduler_type", WHERE),
        ("bf16", {"enabled": True}, "train.bf16", WHERE),
        ("fp16", {"enabled": "auto", "loss_scale": 0}, "train.fp16", WHERE),
        ("torch_autocast", {"enabled": True}, "train.bf16", WHERE),
        ("bf16", 1, "teacher.dtype", TEACHER),
        ("fp16", 1, "teachers[1].dtype", "teachers[1].deepspeed"),
        ("bf16", 1, "teacher.finetune.bf16", "teacher.finetune.deepspeed"),
        ("optimizer", 1, "teacher.finetune.learning_rate", "teacher.finetune.deepspeed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_knob_of_the_run_config_is_refused_naming_its_owner(key, value, owner, where):
    owned = f'sets "{key}", which megakd takes from {owner}; remove the key there and set {owner}'

    assert message_of({key: value}, where) == f"{where} {owned}"


def test_the_file_and_the_nested_key_that_set_a_knob_are_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"data_types": {"param_dtype": "bf16"}}')

    knob = 'mine.json sets "data_types.param_dtype", which megakd takes from train.bf16'
    assert message_of(str(path)).startswith(f"student.deepspeed: {knob}")


def test_knobs_left_to_the_trainer_are_left_out():
    offload = {"device": "cpu", "pin_memory": "auto", "buffer_count": "auto"}
    spec = zero(stage=3, reduce_bucket_size="auto", offload_optimizer=offload)
    spec |= {"train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}}
    spec["optimizer"] = {"params": {"lr": "auto", "betas": "auto"}}

    loaded = load_ds_config(spec, where=WHERE)

    assert loaded == zero(stage=3, offload_optimizer={"device": "cpu"})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"zero_optimization.stage": 2}, 'unknown key "zero_optimization.stage"; did you mean "ze'),
        (zero(**{"offload_param.x": 1}), "zero_optimization.offload_param.x: Extra inputs are no"),
        ({"zero_optimisation": {}}, 'unknown key "zero_optimisation"; did you mean "zero_optimiz'),
        ({"gradient_cliping": 1}, 'unknown key "gradient_cliping"; did you mean "gradient_clipp'),
        ({"gradient_allreduce_op": "sum"}, 'unknown key "gradient_allreduce_op"; known: megakd ze'),
        (zero(stage=2, cpu_offload=True), "cpu_offload cannot be true, which a run could not"),
        ({"zero_optimization": True}, "zero_optimization must be a mapping (got true)"),
        ({"data_types": None}, "data_types must be a mapping (got null)"),
        (zero(stage=4), "stage must be 0, 1, 2 or 3 (got 4)"),
        (zero(stage="3"), 'stage must be 0, 1, 2 or 3 (got "3")'),
        (zero(sub_grup_size=0), 'Extra inputs are not permitted (got 0); did you mean "sub_group'),
        (zero(stage=3, sub_group_size="4"), "sub_group_size must be a number, a mapping, true or"),
        (zero(qqq=0), "zero_optimization.qqq: Extra inputs are not permitted (got 0)"),
        (zero(stage=2, offload_param={"device": "cpu"}), "needs ZeRO stage 3 or above, and the s"),
        (zero(offload_optimizer={"device": "cpu"}), "ZeRO stage 1 or above, and the stage is 0"),
        (zero(stage=3, offload_param={"device": "disk"}), 'must be "none" or "cpu" (got "disk")'),
        (zero(stage=3, offload_optimizer={"device": "nvme"}), '(got "nvme"); NVMe has never been'),
        (zero(stage=2, offload_optimizer={"super_offload": True}), "super_offload cannot be true"),
        (zero(stage=3, zero_hpz_partition_size=8), "zero_hpz_partition_size cannot be 8, which a"),
        (zero(stage=2, zenflow={"topk_ratio": 0.1}), 'zenflow cannot be {"topk_ratio": 0.1}'),
        (zero(stage=2, elastic_checkpoint=True), "elastic_checkpoint cannot be true, which a"),
        (zero(stage=2, load_from_fp32_weights=False), "load_from_fp32_weights cannot be false"),
        (zero(stage=1, overlap_comm=True), "true can give wrong gradients at ZeRO stage 1"),
        ({"checkpoint": {"load_universal": True}}, 'unknown key "checkpoint"; known: megak'),
        (zero(stage=3, offload_param={"devise": "cpu"}), "param.devise: Extra inputs are not perm"),
        (zero(stage=3, offload_param="cpu"), 'offload_param must be a mapping (got "cpu")'),
        ({"megakd": True}, "megakd must be a mapping (got true)"),
        ({"megakd": {"shard_in_node": True}}, "megakd has the keys shard_within_node and clip"),
        ({"megakd": {"clip_on_device": True}}, "clip_on_device: true is for a model that learns"),
        ({"stage": 3}, 'unknown key "stage"; known: megakd zero_optimization activation_checkpoi'),
        ({"megkd": {}}, 'unknown key "megkd"; did you mean "megakd"?'),
        (within("yes"), 'true or false (got {"shard_within_node": "yes"})'),
        (within(value=True, stage=0), "shard_within_node: true needs ZeRO stage 3, not 0; set z"),
    ],
)
def test_what_deepspeed_would_ignore_or_refuse_later_is_refused(spec, message):
    text = message_of(spec, TEACHER)

    assert text.startswith("teacher.deepspeed: ")
    assert message in text


def test_what_deepspeed_reads_is_left_as_it_is():
    spec = zero(stage=2, reduce_bucket_size=5e8, overlap_comm=True, offload_param=NOWHERE)

    assert load_ds_config(spec, where=WHERE) == spec


@pytest.mark.parametrize(("clipping", "dtype"), [(0.0, "bf16"), (0.5, "fp16")])
def test_a_training_engine_gets_what_the_run_config_owns(clipping, dtype):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 7}
    train = TrainConfig(max_grad_norm=clipping, **sizes)

    merged = merged_ds_config(load_ds_config("zero2", where=WHERE), train, dtype=dtype)

    assert merged.pop("zero_optimization")["stage"] == 2
    assert merged == {
        "steps_per_print": 10**9,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clipping,
        dtype: {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_frozen_engine_has_no_optimizer_and_no_clipping(dtype):
    ds = load_ds_config("zero3_offload", where="teacher.deepspeed")

    frozen = frozen_ds_config(ds, dtype=dtype, micro_batch=2)

    zero = frozen.pop("zero_optimization")
    assert "offload_optimizer" not in zero
    assert zero["offload_param"]["device"] == "cpu"
    assert math.isclose(frozen.pop("gradient_clipping"), 0)
    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    precision = {} if dtype == "fp32" else {dtype: {"enabled": True}}
    assert frozen == {"steps_per_print": 10**9, **sizes, **precision}


@pytest.mark.parametrize(
    ("preset", "ranks", "stage"),
    [("zero3", 1, 0), ("zero3", 2, 3), ("zero3_node", 1, 0), ("zero3_offload", 1, 3)],
)
def test_zero_3_is_for_frozen_models_on_several_ranks_or_on_the_host(preset, ranks, stage):
    ds = frozen_on(ranks, load_ds_config(f"teacher_{preset}", where=TEACHER))

    assert zero_stage(ds) == stage
    assert zero_stage(frozen_ds_config(ds, dtype="bf16", micro_batch=1)) == stage


@pytest.mark.parametrize(
    ("stage", "dtype", "accumulates"),
    [(1, "bf16", None), (2, "bf16", "fp32"), (3, "fp16", "fp32"), (0, "fp32", None)],
)
def test_16_bit_gradients_add_up_in_fp32_unless_told_otherwise(stage, dtype, accumulates):
    merged = training(zero(stage=stage), dtype=dtype)

    assert merged.get("data_types", {}).get("grad_accum_dtype") == accumulates
    assert merged.keys() & {"bf16", "fp16"} == {dtype} - {"fp32"}
    mine = {"data_types": {"grad_accum_dtype": "bf16"}, "steps_per_print": 5}
    assert training(zero(stage=stage) | mine, dtype=dtype).items() >= mine.items()


@pytest.mark.parametrize("value", [None, 1.5, -1, math.inf])
def test_a_size_that_is_not_a_whole_number_is_refused_with_its_key_and_value(value):
    offload = {"device": "cpu", "buffer_count": value}
    sizes = zero(stage=3, sub_group_size=value), zero(stage=3, offload_param=offload)

    for spec, key in zip(sizes, ("sub_group_size", "offload_param.buffer_count"), strict=True):
        message = message_of(spec)
        assert message.startswith(f"{WHERE}: zero_optimization.{key}")
        assert f"(got {json.dumps(value)})" in message


@pytest.mark.parametrize("where", [WHERE, "teacher.finetune.deepspeed"])
def test_a_model_that_learns_cannot_be_sharded_within_nodes(run_file, where):
    ds = load_ds_config(NODE, where=TEACHER)
    unused = load_ds_config(within(value=False), where=WHERE)
    message = f"{where}: {NODE}.json: megakd.shard_within_node works only for a frozen model"

    with pytest.raises(ConfigError, match=message):
        load_config(run_file, [f"{where}={NODE}"])
    assert load_config(run_file, [f"teacher.deepspeed={NODE}"])
    # DeepSpeed gets no key of megakd.
    assert "megakd" not in frozen_ds_config(ds, dtype="bf16", micro_batch=1)
    assert "megakd" not in training(unused)
