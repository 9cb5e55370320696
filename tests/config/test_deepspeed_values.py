"""Values in the `zero_optimization` section of a DeepSpeed config."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megakd.config import deepspeed as ds_config
from megakd.config.deepspeed import load_ds_config, preset_names, zero_stage
from megakd.errors import ConfigError

WHERE = "teacher.deepspeed"


def message_of(spec: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_ds_config(spec, where=WHERE)
    return str(caught.value)


def test_auto_in_a_nested_section_is_left_out() -> None:
    offload = {"device": "cpu", "pin_memory": "auto", "buffer_count": "auto"}
    spec = {"zero_optimization": {"stage": 2, "offload_optimizer": offload}}

    zero = load_ds_config(spec, where=WHERE)["zero_optimization"]

    assert zero == {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def test_a_whole_number_may_be_written_with_an_exponent() -> None:
    spec = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}

    assert load_ds_config(spec, where=WHERE) == spec


@pytest.mark.parametrize("value", ["4", None, True, 1.5, -1, math.inf, math.nan, [4]])
def test_a_size_that_is_not_a_whole_number_is_refused_with_its_key(value: object) -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": value}
    offload = {"stage": 3, "offload_param": {"device": "cpu", "buffer_count": value}}

    messages = [message_of({"zero_optimization": it}) for it in (zero, offload)]

    said = f"must be a whole number, 0 or above (got {json.dumps(value)})"
    assert messages == [
        f"{WHERE}: zero_optimization.zero_hpz_partition_size {said}",
        f"{WHERE}: zero_optimization.offload_param.buffer_count {said}",
    ]


def test_the_presets_send_gradients_during_the_backward_at_stage_3_alone() -> None:
    """`tests/distributed/test_overlap.py` and docs/two-models.md say why."""
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    presets = {name: load_ds_config(name, where=WHERE) for name in preset_names()}

    overlapping = {
        name
        for name, ds in presets.items()
        if config.DeepSpeedZeroConfig(**ds["zero_optimization"]).overlap_comm
    }

    assert overlapping == {name for name, ds in presets.items() if zero_stage(ds) == 3}


def test_overlap_that_gives_wrong_gradients_is_refused() -> None:
    refused, accepted = (
        {"zero_optimization": {"stage": stage, "overlap_comm": True}} for stage in (1, 2)
    )

    said = "zero_optimization.overlap_comm: true can give wrong gradients at ZeRO stage 1, because"
    assert message_of(refused).startswith(f"{WHERE}: {said}")
    assert load_ds_config(accepted, where=WHERE) == accepted


def test_the_keys_with_whole_numbers_are_those_of_the_installed_deepspeed() -> None:
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
