"""The dtype in which the gradients of micro-batches are added up."""

from __future__ import annotations

from typing import Any

import pytest

from megakd.config.deepspeed import merged_ds_config
from megakd.config.train import TrainConfig


@pytest.mark.parametrize(
    ("stage", "dtype", "accumulates"),
    [(0, "bf16", None), (1, "bf16", None), (2, "bf16", "fp32"), (3, "fp16", "fp32")]
    + [(stage, "fp32", None) for stage in range(4)],
)
def test_16_bit_gradients_add_up_in_fp32_where_deepspeed_can(
    stage: int, dtype: Any, accumulates: str | None
) -> None:
    ds = {"zero_optimization": {"stage": stage}}

    merged = merged_ds_config(ds, TrainConfig(), dtype=dtype, world_size=1)

    assert merged.get("data_types", {}).get("grad_accum_dtype") == accumulates


def test_a_file_may_name_another_dtype_for_gradients() -> None:
    ds = {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}

    merged = merged_ds_config(ds, TrainConfig(), dtype="bf16", world_size=1)

    assert merged["data_types"] == {"grad_accum_dtype": "bf16"}
