"""Models that ZeRO 3 gathers in parts, as it does with models of billions of weights.

Its limits are below the sizes of the tests' models here; elsewhere, these stay gathered.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_cases import CASES, write_data
from tiny_runs import config_tree, write_config

FEW = 1500
LIMITS = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
IN_PARTS = {"stage": 3, "stage3_param_persistence_threshold": 0}
IN_PARTS |= dict.fromkeys((f"stage3_{name}" for name in LIMITS), FEW)
STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def learned(command, data: Path, out: Path, name: str, zero: dict[str, object]) -> dict:
    given = CASES[name](data)
    engine = {"deepspeed": {"zero_optimization": zero}}
    train = {**given.pop("train", {}), "max_steps": STEPS, "per_device_train_batch_size": 4}
    tree = config_tree(
        out,
        given.pop("task"),
        **{**given, "student": {**given.get("student", {}), **engine}},
        train=train,
        save={"save_steps": STEPS},
    )
    tree["teacher"] |= engine
    tree["eval"] = {**tree.get("eval", {}), "eval_steps": STEPS // 2}
    command("--config", str(write_config(out.with_suffix(".yaml"), tree)), code=0)
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        (record["stage"], record["step"], key): value
        for record in records
        for key, value in record.items()
        if key.startswith(("train/loss", "eval/"))
    }


@pytest.mark.parametrize("name", ["masked", "on_policy", "mixed_vocabulary"])
def test_a_run_learns_as_one_whose_models_are_whole(command, data, tmp_path, name):
    parts = learned(command, data, tmp_path / "parts", name, IN_PARTS)
    whole = learned(command, data, tmp_path / "whole", name, {"stage": 0})

    assert any("eval/" in key for _, _, key in parts)
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5)
