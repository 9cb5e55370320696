"""`megakd.shard_within_node`: where it is allowed, and that DeepSpeed never sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megakd.config.deepspeed import (
    check_frozen_stage,
    frozen_ds_config,
    load_ds_config,
    merged_ds_config,
    shards_within_node,
)
from megakd.config.file import load_config
from megakd.config.train import TrainConfig
from megakd.errors import ConfigError

WHERE = "teacher.deepspeed"
NODE = "teacher_zero3_node"


def within(value: Any, stage: int = 3) -> dict[str, Any]:
    section = {"shard_within_node": value}
    return {"megakd": section, "zero_optimization": {"stage": stage}}


def test_the_preset_is_teacher_zero3_with_the_key() -> None:
    node, everywhere = (load_ds_config(name, where=WHERE) for name in (NODE, "teacher_zero3"))

    assert shards_within_node(node)
    assert not shards_within_node(everywhere)
    assert node.pop("megakd") == {"shard_within_node": True}
    assert node == everywhere


def test_deepspeed_gets_no_key_of_megakd() -> None:
    ds = load_ds_config(NODE, where=WHERE)
    unused = load_ds_config(within(value=False), where="student.deepspeed")

    check_frozen_stage(ds, where=WHERE)
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
def test_a_section_that_cannot_be_meant_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_ds_config(spec, where=WHERE)

    assert message in str(caught.value)


@pytest.mark.parametrize("where", ["student.deepspeed", "teacher.finetune.deepspeed"])
def test_a_model_that_learns_cannot_be_sharded_within_nodes(run_file: Path, where: str) -> None:
    message = f"{where}: megakd.shard_within_node works only for a frozen model"

    with pytest.raises(ConfigError, match=message):
        load_config(run_file, [f"{where}={NODE}"])
    with pytest.raises(ConfigError, match="works only for a frozen model"):
        merged_ds_config(within(value=True), TrainConfig(), dtype="fp32", world_size=2)
    assert load_config(run_file, [f"teacher.deepspeed={NODE}"])
