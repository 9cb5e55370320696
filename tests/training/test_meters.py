"""The log of a stage, and the values that stop a run."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from unit_counts import counts_of

from megakd.config.sections import TrainConfig
from megakd.config.task import TaskType
from megakd.config.terms import HardCrossEntropy, Shape, SoftTargetKl, TermConfig
from megakd.data.batch import Batch, Outputs
from megakd.engine.distributed import Ranks
from megakd.errors import TrainingError
from megakd.losses.objective import build_objective
from megakd.stage import Stage, StepReport
from megakd.training.meter import TrainMeter
from megakd.training.trainer import AnswerWatch, Stopwatch

CE = HardCrossEntropy(loss="hard_cross_entropy")
KL = SoftTargetKl(loss="soft_target_kl")
ON_ROLLOUTS = SoftTargetKl(loss="soft_target_kl", on="rollouts")
FULL = (4, 3, 50)  # examples, targets, tokens of a step
MASKED = (4, 0, 50)
CPU = torch.device("cpu")
VALID = torch.tensor([[True, False], [True, True], [False, False]])


class Watched:
    """A health beside a loop that takes the steps it is told to take."""

    def __init__(
        self, *terms: TermConfig, fp16: bool = False, task: TaskType = "classification"
    ) -> None:
        shape = Shape(2, 4, 3)
        self.trainer: Any = SimpleNamespace(
            step=0,
            teacher_clock=Stopwatch(),
            learning_rate=lambda step: 0.1 * step,
            watch=AnswerWatch(),
            student=SimpleNamespace(bundle=SimpleNamespace(by_role={}, role="student")),
            teachers={},
        )
        self.health = TrainMeter(
            build_objective(terms or (CE,), task, shape, shape),
            self.trainer,
            Stage(name="distil", train=TrainConfig(fp16=fp16)),
            Ranks(0, 1, 0, CPU),
        )

    def step(
        self,
        *,
        norm: float | None = 1.0,
        counts: Any = FULL,
        rollouts: int = 0,
        scalars: Any = MappingProxyType({}),
        **parts: float,
    ) -> None:
        report = StepReport(
            step=self.trainer.step,
            parts={name: torch.tensor(value) for name, value in {"loss": 1.0, **parts}.items()},
            gradient_norm=None if norm is None else torch.tensor(norm),
            counts=counts_of(*counts) | {"rollout_targets": torch.tensor(rollouts)},
            scalars=scalars,
        )
        self.trainer.step += 1
        self.health.add(report)

    def scalars(self, waited_s: float = 0.0) -> dict[str, float]:
        return self.health.scalars(waited_s=waited_s)


def check(watched: Watched, newest: Path | None = None) -> None:
    watched.health.check_finite(lambda: newest)


@pytest.mark.parametrize(
    ("is_fp16", "norm"),
    [(False, 1.0), (False, None), *((True, norm) for norm in (math.nan, math.inf, -1.0))],
)
def test_a_run_whose_losses_are_finite_goes_on_and_under_fp16_skips_gradients(is_fp16, norm):
    watched = Watched(fp16=is_fp16)
    scaling = {"train/loss_scale": 512.0, "train/skipped_steps": 2.0}
    watched.trainer.student.scaling = lambda: scaling if is_fp16 else {}

    check(watched)  # before the first step
    watched.step(norm=norm)
    check(watched)

    scalars = watched.scalars()
    assert ("train/gradient_norm" in scalars) is (norm is not None)
    assert (scaling.items() <= scalars.items()) is is_fp16


@pytest.mark.parametrize(
    ("loss", "norm", "is_fp16", "newest"),
    [
        (math.nan, 1.0, False, Path("checkpoints/distil/step-1")),
        (math.inf, 1.0, True, None),
        (-math.inf, 1.0, False, None),
        *((1.0, norm, False, None) for norm in (math.nan, math.inf, -1.0)),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(loss, norm, is_fp16, newest):
    """DeepSpeed's norm is -1 where a gradient is not finite; it skips that step and goes on.

    Under fp16 only losses count.
    """
    watched = Watched(fp16=is_fp16)
    for one in ({}, {"loss": loss, "norm": norm}, {"norm": math.nan}):
        watched.step(**one)

    known = re.escape(str(newest or "none (nothing was saved yet)"))
    message = "distil: the loss or its gradient is not finite .* at step 2; "
    with pytest.raises(TrainingError, match=f"{message}.*the last good checkpoint is {known}; low"):
        check(watched, newest)


def test_steps_that_all_overflow_under_fp16_stop_the_run():
    watched = Watched(fp16=True)
    for norm in (*[math.inf] * 31, 1.0, *[math.inf] * 31):
        watched.step(norm=norm)
    check(watched)
    watched.step(norm=math.inf)

    with pytest.raises(TrainingError, match=r"at step 64; .* use train\.bf16 or fp32, or lower"):
        check(watched)


def failed(*answers: Outputs, targets: torch.Tensor | None = None) -> list[str]:
    watch = AnswerWatch()
    for answer in answers:
        batch = Batch({}, torch.zeros(3, dtype=torch.long), VALID, targets)
        watch.add({"calm": Outputs(logits=torch.zeros(3, 2)), "seen": answer}, batch)
    return watch.failed(CPU)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_teacher_with_an_answer_that_is_not_finite_is_named_unless_it_is_about_padding(bad):
    logits, hidden = torch.zeros(3, 2), torch.zeros(3, 2, 4)
    logits[2] = hidden[0, 1] = hidden[2] = bad  # padding and an empty row
    for fine in ((Outputs(logits=logits),), (Outputs(hidden=hidden),), (Outputs(),), ()):
        assert failed(*fine) == []

    logits[1, 0] = hidden[1, 1, 2] = bad

    assert failed(Outputs(logits=logits)) == failed(Outputs(hidden=hidden)) == ["seen"]
    assert failed(Outputs(hidden=hidden[1]), targets=torch.tensor([2, 3])) == ["seen"]
    # A good answer does not make up for it.
    assert failed(Outputs(logits=logits), Outputs(logits=torch.zeros(3, 2))) == ["seen"]


def test_a_teacher_whose_answers_are_not_finite_is_blamed_in_place_of_the_learning_rate():
    watched = Watched()
    batch = Batch({}, torch.zeros(1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    answers = {"calm": 1.0, "mad": math.nan}
    known = {name: Outputs(logits=torch.tensor([[x]])) for name, x in answers.items()}
    watched.trainer.watch.add(known, batch)
    watched.step(loss=math.nan)

    with pytest.raises(TrainingError, match="outputs of mad are not finite: check the") as caught:
        check(watched)
    assert "learning_rate" not in str(caught.value)


def test_steps_without_any_label_are_warned_about_once_where_a_term_reads_them(caplog):
    watched, indifferent = Watched(), Watched(KL)
    indifferent.step(counts=MASKED)
    indifferent.scalars()
    for counts in ((FULL,), (FULL, MASKED, MASKED), (MASKED,)):
        for one in counts:
            watched.step(counts=one)
        watched.scalars()

    assert [record.getMessage() for record in caplog.records] == [
        "distil: 2 of the last 3 steps had no label, and terms on labels add nothing to them "
        "(logged once)"
    ]


def test_a_window_of_many_steps_is_logged_as_its_mean_and_checked_as_one_of_few():
    watched = Watched(CE, KL)
    for number in range(250):
        watched.step(loss=float(number % 5), soft_target_kl=float(number % 2))
    first = watched.scalars()
    assert (first["train/loss"], first["train/soft_target_kl"]) == (2.0, 0.5)

    watched.step(loss=math.nan)
    for _ in range(250):
        watched.step()
    with pytest.raises(TrainingError, match="at step 251;"):
        check(watched)


def test_a_term_on_rollouts_is_logged_as_its_mean_over_the_steps_that_have_rollouts():
    name = "soft_target_kl_on_rollouts"
    watched = Watched(ON_ROLLOUTS, task="causal_lm")
    for value, rollouts in ((2.0, 5), (0.0, 0), (4.0, 1)):
        watched.step(rollouts=rollouts, **{name: value, "loss": value})

    first = watched.scalars()
    watched.step(rollouts=0, **{name: 0.0, "loss": 0.0})

    assert (first[f"train/{name}"], first["train/loss"]) == (3.0, 2.0)
    assert f"train/{name}" not in watched.scalars()


def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr("megakd.training.meter.time.perf_counter", lambda: time.now)
    return time


def test_speed_and_shares_are_those_of_the_window_without_what_paused_it(monkeypatch):
    time = clock(monkeypatch)
    watched = Watched()
    watched.health.begin()
    watched.step()
    monkeypatch.setattr(watched.trainer.teacher_clock, "seconds", lambda: 1.0)
    time.now += 4
    with watched.health.paused():
        time.now += 50
    first = watched.scalars(waited_s=0.5)
    watched.step()
    monkeypatch.setattr(watched.trainer.teacher_clock, "seconds", lambda: 1.5)
    time.now += 1

    second = watched.scalars(waited_s=0.75)

    names = ("tokens_per_s", "step_seconds", "teacher_share", "data_share")
    assert [first[f"train/{name}"] for name in names] == [50 / 4, 4.0, 0.25, 0.125]
    assert [second[f"train/{name}"] for name in names] == [50.0, 1.0, 0.5, 0.25]
    assert watched.health.tokens_per_second() == 100 / 5
    assert watched.health.elapsed_seconds() == 55.0


def test_a_resumed_run_goes_on_with_the_totals_of_the_one_before(monkeypatch):
    time = clock(monkeypatch)
    before, after = Watched(), Watched()
    before.step(loss=1.0)
    time.now += 2
    before.scalars()
    time.now += 3

    after.health.load_state_dict(before.health.state_dict())
    time.now += 1000  # between the two runs
    after.health.begin()
    after.trainer.step = 1
    after.step(loss=4.0)
    time.now += 1
    scalars = after.scalars()

    assert (scalars["train/loss"], scalars["train/tokens_per_s"]) == (4.0, 50.0)
    assert after.health.tokens_per_second() == 100 / 3
    assert after.health.elapsed_seconds() == 6.0


def test_values_of_a_strategy_are_logged_as_means_over_the_steps_that_have_one():
    watched = Watched()
    watched.step(scalars={"select/a": 0.25})
    watched.step(scalars={"select/a": 0.75, "select/reward": 2.0})

    first, second = watched.scalars(), watched.scalars()

    assert (first["select/a"], first["select/reward"]) == (0.5, 2.0)
    assert "select/a" not in second
