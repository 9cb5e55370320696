"""Micro-batches that a teacher answers in one forward: the rule, and its line in the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planned_runs import config_of as run_config
from planned_runs import per_call, plan_of, sent, trained
from tiny_runs import bert

from megakd.config.run import RunConfig
from megakd.inputs import step_size
from megakd.planning.memory import Share
from megakd.planning.plan import Plan, page


def config_of(folder: Path, *overrides: str) -> RunConfig:
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
    assert per_call(config_of(tmp_path, *settings)) == count


def test_answers_that_do_not_fit_together_are_asked_for_one_by_one(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    row = 4 * 16 * 32 * 4  # rows, tokens, columns, bytes of one micro-batch
    monkeypatch.setitem(step_size.BUDGET, "cpu", row * (1 + step_size._IN_FLIGHT) * 6)

    assert per_call(config) == 6
    assert per_call(config, 1, 2, 3) == 1


def planned(folder: Path, *overrides: str, **cluster: Any) -> Plan:
    return plan_of(config_of(folder, *overrides), **{"device": "cpu", **cluster})


def test_a_teacher_sharded_within_nodes_is_planned_over_the_ranks_of_a_node(tmp_path):
    node = "teacher.deepspeed=teacher_zero3_node"

    def weights_and_network(*overrides: str, **cluster: int) -> tuple[int, float]:
        plan = planned(tmp_path, *overrides, device="cuda", **cluster)
        return plan.part("teacher", "weights"), sent(trained(plan), "teacher")

    on_one = weights_and_network()
    assert weights_and_network(node) == on_one
    on_two = weights_and_network(node, ranks=4, nodes=2)
    assert on_two == pytest.approx(on_one)
    assert on_two[0] > weights_and_network(ranks=4, nodes=2)[0]
    assert weights_and_network(node, nodes=2)[1] == 0  # a whole copy per rank


def test_a_plan_shows_the_calls_and_counts_their_network_and_answers(tmp_path):
    together = planned(tmp_path)
    one_by_one = planned(tmp_path, "teacher.joins_micro_batches=false")

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
