"""The plan of a run whose rows are packed by a token budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planned_runs import CAUSAL, per_call, plan_of, trained
from planned_runs import config_of as run_config
from tiny_runs import llama

from megakd.config.run import RunConfig
from megakd.inputs import step_size
from megakd.inputs.step_size import largest_step
from megakd.planning.plan import Plan

LENGTH = 64


def config_of(folder: Path, *overrides: str) -> RunConfig:
    long = {"max_position_embeddings": LENGTH, "vocab_size": 64}
    return run_config(
        folder,
        *overrides,
        task={**CAUSAL, "max_length": LENGTH},
        teacher={"model": llama(3, width=32, **long)},
        student={"model": llama(2, **long), "deepspeed": "zero0"},
        objective=[{"loss": "soft_target_kl"}, {"loss": "hidden_mse"}],
        train={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
        eval={"per_device_eval_batch_size": 1},
    )


def planned(folder: Path, *overrides: str, **cluster: Any) -> Plan:
    return plan_of(config_of(folder, *overrides), **cluster)


def budget(texts: int) -> str:
    return f"train.tokens_per_rank={texts * LENGTH}"


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ((), (4, 8, LENGTH)),
        ((budget(8),), (4, 1, 8 * LENGTH)),
        ((budget(3),), (11, 1, 3 * LENGTH)),
        ((budget(100),), (1, 1, 100 * LENGTH)),
        ((f"train.tokens_per_rank={2 * LENGTH - 1}",), (32, 1, 2 * LENGTH - 1)),
    ],
)
def test_the_largest_step_has_one_row_of_the_budget_per_micro_batch(tmp_path, overrides, size):
    config = config_of(tmp_path, *overrides)
    assert largest_step(config.train, config.task) == size


def test_a_teacher_is_asked_for_all_packed_rows_if_they_fit_into_memory(tmp_path, monkeypatch):
    def asked(*overrides: str) -> int:
        return per_call(config_of(tmp_path, budget(3), *overrides))

    assert asked() == 11
    row = 3 * LENGTH * 32 * 4  # tokens, columns, bytes of one packed row
    monkeypatch.setitem(step_size.BUDGET, "cpu", row * (1 + step_size._IN_FLIGHT) * 10)
    assert asked() == 1
    assert asked("teacher.joins_micro_batches=true") == 11


def activations(plan: Plan, role: str = "student") -> int:
    return plan.part(role, "activations")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_packed_row_needs_the_memory_of_as_many_padded_tokens(tmp_path, role):
    one_by_one = "teacher.joins_micro_batches=false"
    padded = activations(planned(tmp_path, one_by_one), role)
    packed = activations(planned(tmp_path, one_by_one, budget(8)), role)
    twice = activations(planned(tmp_path, one_by_one, budget(16)), role)

    assert packed == pytest.approx(padded, rel=0.02)
    assert twice == pytest.approx(2 * packed, rel=0.05)


def test_a_step_costs_as_many_operations_however_its_rows_are_packed(tmp_path):
    padded, packed, longer = (
        trained(planned(tmp_path, *overrides)).flops
        for overrides in ((), (budget(8),), (budget(32),))
    )

    assert packed == pytest.approx(padded)
    assert longer == pytest.approx(padded)


def test_on_a_cpu_a_packed_row_also_has_a_mask_of_all_its_positions(tmp_path):
    padded = activations(planned(tmp_path, device="cpu"))
    packed = activations(planned(tmp_path, budget(8), device="cpu"))
    assert packed > padded + (8 * LENGTH) ** 2


def test_offloaded_layer_inputs_are_on_the_host_and_not_on_the_device(tmp_path):
    repeats, rows = ("train.gradient_checkpointing=true", budget(32)), 32 * LENGTH
    kept, away = (
        planned(
            tmp_path,
            *repeats,
            f"train.activation_offload={value}",
            "student.model.config.num_hidden_layers=9",
        )
        for value in ("false", "true")
    )

    inputs = 9 * rows * 16 * 2  # layers, tokens, columns, bytes in bf16
    assert activations(away) < activations(kept) - inputs / 3
    assert away.host_bytes_per_rank >= inputs
