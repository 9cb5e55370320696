"""A plan counts gradients and optimizer states of the adapters alone, and all weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planned_runs import CAUSAL, config_of, plan_of, trained
from tiny_runs import llama

from megakd.planning.memory import Share
from megakd.planning.plan import Plan

WIDTH, VOCABULARY, LAYERS, RANK = 32, 96, 2, 2
# Llama: queries, output [W, W]; keys, values [W / 2, W]; three matrices of an MLP [2 W, W].
ADAPTERS = LAYERS * RANK * (2 * 2 * WIDTH + 2 * (WIDTH + WIDTH // 2) + 3 * 3 * WIDTH)


def planned(tmp_path: Path, student: dict[str, Any], **sections: Any) -> Plan:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    shape = llama(LAYERS, WIDTH, vocab_size=VOCABULARY)["config"]
    (model / "config.json").write_text(json.dumps(shape))
    given = {"student": {"model": str(model), **student}, "method": {"name": "finetune"}}
    train = {"per_device_train_batch_size": 1, "bf16": False}
    config = config_of(tmp_path, task=CAUSAL, train=train, **{**given, **sections})
    return plan_of(config, ranks=1)


def parts(tmp_path: Path, student: dict[str, Any]) -> dict[str, int]:
    return planned(tmp_path, student).as_json()["roles"]["student"]


def test_a_plan_has_moments_of_the_adapters_alone_and_the_weights_of_all(tmp_path: Path) -> None:
    whole = parts(tmp_path, {"deepspeed": "zero0"})
    result = parts(tmp_path, {"deepspeed": "zero0", "lora": {"r": RANK}})
    assert result["optimizer"] == 2 * 4 * ADAPTERS
    assert result["weights"] == whole["weights"] + 4 * ADAPTERS
    assert result["gradients"] < whole["gradients"] / 3


def test_a_plan_of_the_base_as_teacher_has_its_forward_and_no_second_model(tmp_path: Path) -> None:
    lora, objective = {"lora": {"r": RANK}}, [{"loss": "soft_target_kl"}]

    method = {"name": "single"}
    base, second = (
        trained(planned(tmp_path, lora, teacher={"model": one}, method=method, objective=objective))
        for one in ("student_base", str(tmp_path / "model"))
    )

    assert base.most[Share("teacher", "weights")] == 0
    assert second.most[Share("teacher", "weights")] > 0
    assert base.flops == pytest.approx(second.flops, rel=0.01)
