"""Micro-batches of a step: packed by a token budget, and answered by a teacher in one forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planned_runs import CAUSAL, per_call, plan_of, sent, trained
from planned_runs import config_of as run_config
from tiny_runs import bert, llama

from megakd.config.run import RunConfig
from megakd.reports.plan import Plan, page
from megakd.reports.plan_memory import Share
from megakd.training import precision
from megakd.training.precision import largest_step

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
    monkeypatch.setitem(precision.BUDGET, "cpu", row * (1 + precision._IN_FLIGHT) * 10)
    assert asked() == 1
    assert asked("teacher.joins_micro_batches=true") == 11


def activations(plan: Plan, role: str = "student") -> int:
    return plan.part(role, "activations")


def test_a_packed_row_costs_what_as_many_padded_tokens_do(tmp_path):
    padded, packed, twice = (
        planned(tmp_path, "teacher.joins_micro_batches=false", *more)
        for more in ((), (budget(8),), (budget(16),))
    )

    for role in ("student", "teacher"):
        held = activations(packed, role)
        assert held == pytest.approx(activations(padded, role), rel=0.02)
        assert activations(twice, role) == pytest.approx(2 * held, rel=0.05)
    # A step costs as many operations however its rows are packed.
    flops = [trained(plan).flops for plan in (padded, packed, twice)]
    assert flops == pytest.approx([flops[0]] * 3)


def test_on_a_cpu_a_packed_row_also_has_a_mask_of_all_its_positions(tmp_path):
    padded = activations(planned(tmp_path, device="cpu"))
    packed = activations(planned(tmp_path, budget(8), device="cpu"))
    assert packed > padded + (8 * LENGTH) ** 2


def test_offloaded_layer_inputs_are_on_the_host_and_not_on_the_device(tmp_path):
    words = ("train.gradient_checkpointing=true", "student.model.config.num_hidden_layers=9")
    kept, away = (
        planned(tmp_path, *words, budget(32), f"train.activation_offload={value}")
        for value in ("false", "true")
    )

    inputs = 9 * 32 * LENGTH * 16 * 2  # layers, tokens, columns, bytes in bf16
    assert activations(away) < activations(kept) - inputs / 3
    assert away.host_bytes_per_rank >= inputs


def asking(folder: Path, *overrides: str) -> RunConfig:
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6}
    return run_config(
        folder,
        *overrides,
        teacher={"model": bert(3, width=32, vocab_size=300)},
        student={"model": bert(1, vocab_size=300), "deepspeed": "zero0"},
        objective=[{"loss": "soft_target_kl"}, {"loss": "hidden_mse"}],
        train={**batch, "max_steps": 8},
    )


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ((), 6),
        (("teacher.deepspeed=teacher_zero0",), 1),
        (("teacher.deepspeed=teacher_zero0", "teacher.joins_micro_batches=true"), 6),
        (("teacher.joins_micro_batches=false",), 1),
        (("train.gradient_accumulation_steps=1", "teacher.joins_micro_batches=true"), 1),
    ],
)
def test_a_sharded_teacher_answers_all_micro_batches_at_once_unless_told(tmp_path, settings, count):
    assert per_call(asking(tmp_path, *settings)) == count


def test_answers_that_do_not_fit_together_are_asked_for_one_by_one(tmp_path, monkeypatch):
    config = asking(tmp_path)
    row = 4 * 16 * 32 * 4  # rows, tokens, columns, bytes of one micro-batch
    monkeypatch.setitem(precision.BUDGET, "cpu", row * (1 + precision._IN_FLIGHT) * 6)

    assert per_call(config) == 6
    assert per_call(config, 1, 2, 3) == 1


def test_a_teacher_sharded_within_nodes_is_planned_over_the_ranks_of_a_node(tmp_path):
    node = "teacher.deepspeed=teacher_zero3_node"

    def weights_and_network(*overrides: str, **cluster: int) -> tuple[int, float]:
        plan = plan_of(asking(tmp_path, *overrides), **cluster)
        return plan.part("teacher", "weights"), sent(trained(plan), "teacher")

    on_one = weights_and_network()
    assert weights_and_network(node) == on_one
    on_two = weights_and_network(node, ranks=4, nodes=2)
    assert on_two == pytest.approx(on_one)
    assert on_two[0] > weights_and_network(ranks=4, nodes=2)[0]
    assert weights_and_network(node, nodes=2)[1] == 0  # a whole copy per rank


def test_a_plan_shows_the_calls_and_counts_their_network_and_answers(tmp_path):
    one_by_one = plan_of(asking(tmp_path, "teacher.joins_micro_batches=false"), device="cpu")
    together = plan_of(asking(tmp_path), device="cpu")

    ours, theirs = map(trained, (together, one_by_one))
    assert ours.per_call == {"teacher": 6}
    assert sent(ours, "teacher") == pytest.approx(sent(theirs, "teacher") / 6)
    assert ours.flops == pytest.approx(theirs.flops)
    line = "student: teacher answers 6 micro-batches in one forward (teacher.joins_micro_batches)"
    assert line in page(together)
    assert "in one forward" not in page(one_by_one)
    phases = {phase["name"]: phase for phase in together.as_json()["phases"]}
    assert phases["student"]["micro_batches_per_call"] == {"teacher": 6}
    answers = Share("teacher", "activations")
    assert ours.most[answers] > 4 * theirs.most[answers]
