"""The loop: the teachers of the next step, and the values that it keeps on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from waiting import Waiting, no_waiting

from megakd.data.batch import IGNORE, Batch, Counts, Outputs, Pass, count_units
from megakd.stage import Strategy
from megakd.training.trainer import Trainer

BATCH = Batch({}, torch.tensor([1]), torch.ones(1, 1, dtype=torch.bool))


class Student:
    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def forward_backward(
        self, batch: Batch, knowledge: Mapping[str, Outputs], plan: Any, counts: Counts, **options
    ) -> dict[str, Tensor]:
        self.told.append(("forward_backward", tuple(knowledge), options["boundary"]))
        return {"term": torch.tensor(1.0)}

    def step(self, learning_rate: float) -> Tensor:
        return torch.tensor(3.0)


class Teacher:
    """Knows nothing."""

    def __init__(self, told: list[Any], name: str) -> None:
        self.told, self.name = told, name

    def __call__(self, batch: Batch) -> Outputs:
        self.told.append(("asked", self.name))
        return Outputs()

    def answers(self, batches: Sequence[Batch]) -> Iterator[Outputs]:
        return map(self, batches)

    def prefetch(self) -> None:
        self.told.append(("next", self.name))

    def evict(self) -> None:
        self.told.append(("idle", self.name))


class Steering(Strategy):
    """A strategy that plans different teachers at different steps."""

    def __init__(self, told: list[Any], plans: Sequence[tuple[Pass, ...]]) -> None:
        self.told, self.plans = told, plans

    def passes(self, step: int) -> tuple[Pass, ...]:
        self.told.append(("plan", step))
        return self.plans[step % len(self.plans)]


def trainer_of(told: list[Any], *, plans: Any, teachers: Any = ()):
    return Trainer(
        student=Student(told),
        teachers={name: Teacher(told, name) for name in teachers},
        strategy=Steering(told, plans),
        sum_counts=count_units,
        learning_rate=lambda step: 0.1 * step,
    )


def test_the_next_steps_teachers_make_ready_before_the_student_learns_and_the_others_rest_first():
    told = []
    plans = ((Pass(teacher="b"),), (Pass(teacher="a"),))
    trainer = trainer_of(told, plans=plans, teachers=("a", "b", "c"))

    trainer.train_step([BATCH, BATCH])

    assert told[:9] == [
        ("plan", 0),
        ("asked", "b"),
        ("forward_backward", ("b",), False),
        ("asked", "b"),
        ("plan", 1),
        ("idle", "b"),
        ("idle", "c"),
        ("next", "a"),
        ("forward_backward", ("b",), True),
    ]


@pytest.mark.parametrize("teachers", [(), ("a", "b")], ids=len)
def test_where_no_teacher_is_idle_nothing_is_planned_ahead(teachers):
    told = []
    plan = tuple(Pass(teacher=name) for name in teachers) or (Pass(),)

    trainer_of(told, plans=(plan,), teachers=teachers).train_step([BATCH, BATCH])

    assert [event for event in told if event[0] in {"plan", "idle", "next"}] == [("plan", 0)]


class Answering(Teacher):
    """Knows something about two rows of three tokens."""

    def __init__(self, known: Outputs) -> None:
        super().__init__([], "teacher")
        self.known = known

    def __call__(self, batch: Batch) -> Outputs:
        return self.known


@pytest.mark.parametrize(
    ("labels", "known"),
    [
        ([1, IGNORE], Outputs(logits=torch.zeros(2, 3))),
        ([1.5, math.nan], Outputs(logits=torch.zeros(2, 1))),
        ([[1, 2, 3], [4, IGNORE, IGNORE]], Outputs(hidden=torch.zeros(2, 3, 4))),
    ],
    ids=["classification", "regression", "causal_lm"],
)
def test_no_operation_of_a_step_makes_the_host_wait_for_the_device(labels, known):
    """The models and the losses do not either, see test_pretended_gpu.py and tests/losses."""
    trainer = trainer_of([], plans=((Pass(teacher="teacher"),),))
    trainer.teachers = {"teacher": Answering(known)}
    valid = torch.tensor([[True, True, True], [True, True, False]])
    inputs = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]])}
    batch = Batch(inputs, torch.tensor(labels), valid)

    with no_waiting():
        reports = [trainer.train_step([batch, batch]) for _ in range(2)]

    assert [report.parts["term"].item() for report in reports] == [2.0, 2.0]


@pytest.mark.parametrize("reads", [bool, Tensor.item, Tensor.nonzero, lambda t: t[t > 0]])
def test_that_check_notices_what_makes_the_host_wait(reads):
    with Waiting(), pytest.raises(AssertionError, match="makes the host wait"):
        reads(torch.ones(()) if reads in (bool, Tensor.item) else torch.ones(2))
