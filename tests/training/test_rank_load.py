"""How fast teacher and student compute, how long each rank waits, and which rank is slow."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import NO_DROPOUT, bert, run_in, write_jsonl
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from unit_counts import counts_of

from megakd.contract.stage import StepReport
from megakd.engine import collectives
from megakd.engine.activity import Stopwatch
from megakd.engine.distributed import Ranks
from megakd.scoring.watches import LOGS, SlowRank
from megakd.training.meters import RankLoad
from megakd.training.operations import StepOperations, passes_of, peak_tflops

LENGTH, ROWS = 16, 4


@pytest.mark.parametrize(
    ("logs", "rank", "at"),
    [
        ([[1.0, 1.3, 1.0]] * LOGS, 1, LOGS),
        ([[1.0, 1.3]] * (3 * LOGS), 1, LOGS),  # once
        ([[1.0, 1.29, 1.0]] * LOGS, None, None),
        ([[0.1, 0.19, 0.1]] * LOGS, None, None),  # the log itself takes rank 0 so long
        ([[2.0, 1.0, 1.0]] * (LOGS - 1) + [[1.0, 2.0, 1.0]] * (LOGS - 1), None, None),
        ([[2.0, 1.0]] * (LOGS - 1) + [[1.0, 1.0]] + [[2.0, 1.0]] * LOGS, 0, 2 * LOGS),
        ([[2.0, 2.0, 2.0, 1.0]] * LOGS, None, None),
    ],
)
def test_a_rank_is_slow_after_five_logs_in_a_row_above_the_median(logs, rank, at):
    wanted = [rank if number == at else None for number in range(1, len(logs) + 1)]
    watch = SlowRank()

    assert [watch.add(computing) for computing in logs] == wanted


def counted(forward, *, asks=lambda: False) -> tuple[float, float]:
    operations = StepOperations(asks)
    with operations:
        forward()
    return operations.student, operations.teacher


def test_forwards_are_counted_and_backwards_and_what_they_repeat_are_not():
    layer, inputs = nn.Linear(8, 16), torch.ones(4, 8, requires_grad=True)
    asking = SimpleNamespace(teacher=False)

    def step(run):
        asking.teacher = True
        layer(inputs.detach())
        layer(inputs.detach())
        asking.teacher = False
        run(inputs).sum().backward()

    plain = counted(lambda: step(layer), asks=lambda: asking.teacher)
    repeated = counted(
        lambda: step(lambda x: checkpoint(layer, x, use_reentrant=False)),
        asks=lambda: asking.teacher,
    )

    assert plain == repeated == (2 * 4 * 8 * 16, 2 * 2 * 4 * 8 * 16)


def test_a_backward_is_two_forwards_and_one_where_all_weights_are_frozen():
    whole, half = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    half[0].requires_grad_(requires_grad=False)

    assert (passes_of(whole), passes_of(half)) == (3.0, 2.5)


def test_an_operator_that_torch_cannot_count_counts_as_nothing(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setitem(flop_registry, torch.ops.aten.mm, refuse)

    assert counted(lambda: torch.ones(2, 3) @ torch.ones(3, 4)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("Intel(R) Xeon(R) Processor", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(device, peak):
    assert peak_tflops(device) == peak


def test_the_rates_of_a_log_are_those_of_the_plan(tmp_path, one_rank):
    words = " ".join(["good"] * (LENGTH - 2))
    rows = [{"text": words, "label": name} for name in ("a", "b")] * 20
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", rows)
    config = run_in(
        tmp_path,
        {"type": "classification", "dataset": str(tmp_path / "data"), "max_length": LENGTH},
        teacher={"model": bert(3, 32, **NO_DROPOUT)},
        student={"model": bert(2, **NO_DROPOUT)},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}],
        train={"max_steps": 3, "per_device_train_batch_size": ROWS},
        log={"logging_steps": 1},
    )

    assert one_rank.train("--config", config).code == 0

    logs = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    logs = [log for log in logs if log["stage"] == "student" and "train/loss" in log]
    plan = json.loads(one_rank.megakd("plan", config, "--json").out)
    planned = next(p["flops_per_step"] for p in plan["phases"] if p["flops_per_step"])
    for log in logs:
        seconds = 1e12 * log["train/step_seconds"]
        done = seconds * (log["train/student_tflops"] + log["train/teacher_tflops"])
        assert done == pytest.approx(planned, rel=0.02)  # the first layer's inputs need no product
        assert log["train/teacher_tflops"] > log["train/student_tflops"]
        assert not any(name.startswith("ranks/") for name in log)


def test_nccls_records_are_added_once_and_those_that_were_overwritten_are_estimated(monkeypatch):
    def record(number, milliseconds=None):
        done = {} if milliseconds is None else {"duration_ms": milliseconds}
        return {"record_id": number, **done}

    dumps = [
        [record(0, 100.0), record(1, 200.0), record(2)],
        [record(1, 200.0), record(2, 300.0)],
        [record(5, 100.0), record(6, 300.0)],  # 3 and 4 are gone
        [],
    ]
    monkeypatch.setattr(collectives, "_last_record", [-1])
    monkeypatch.setattr(
        collectives._distributed_c10d,
        "_dump_nccl_trace_json",
        lambda: json.dumps({"entries": dumps.pop(0)}),
        raising=False,
    )
    before = collectives._on_host[0] + collectives._on_gpu[0]

    seconds = [collectives.seconds_in_collectives() - before for _ in range(4)]

    assert seconds == pytest.approx([0.3, 0.6, 1.4, 1.4])


class Steps:
    """A stage of so many steps on one of some ranks, each with a product of a student."""

    def __init__(self, step: int = 0, *, world: int = 1) -> None:
        self.trainer = SimpleNamespace(step=step, teacher_clock=Stopwatch())
        self.load = RankLoad(self.trainer, "student", Ranks(0, world, 0, torch.device("cpu")))
        self.counted: list[int] = []

    def take(self, until: int) -> None:
        while self.trainer.step < until:
            before = self.load.state()
            self.load.watch(self._step)
            self.trainer.step += 1
            if self.load.state() != before:
                self.counted.append(self.trainer.step)

    def _step(self) -> StepReport:
        torch.ones(2, 3) @ torch.ones(3, 5)
        counts = counts_of(1, 1, 10)
        return StepReport(step=self.trainer.step, parts={}, gradient_norm=None, counts=counts)


def test_a_resumed_stage_counts_in_the_steps_in_which_an_unbroken_one_counts():
    unbroken, before, after = Steps(), Steps(), Steps(step=6)
    unbroken.take(20)

    before.take(6)
    after.load.load_state([before.load.state()])
    after.take(20)

    assert unbroken.counted == [1, 2, 4, 8, 16]
    assert before.counted + after.counted == unbroken.counted
    assert after.load.state() == unbroken.load.state() == [5 * 2 * 2 * 3 * 5, 0, 50]


def test_other_ranks_share_what_the_ranks_of_the_checkpoint_have_counted():
    states = [[60.0, 6.0, 10.0], [80.0, 8.0, 10.0]]
    one, four = Steps(), Steps(world=4)

    one.load.load_state(states)
    four.load.load_state(states)

    assert one.load.state() == [140.0, 14.0, 10.0]
    assert four.load.state() == [35.0, 3.5, 10.0]
