"""The loop: the order of its calls, the values that it keeps on the device, and resuming."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from unit_counts import numbers
from waiting import Waiting, no_waiting

from megakd.contract.batch import IGNORE, Batch, Counts, Knowledge, LogitWarp
from megakd.contract.stage import Constant, Pass, StepReport
from megakd.contract.terms import (
    HardCrossEntropy,
    HardMse,
    HiddenCosine,
    HiddenMse,
    SoftTargetJsd,
    SoftTargetKl,
    SoftTargetMse,
)
from megakd.contract.unit_counts import count_units
from megakd.contract.views import Shape
from megakd.losses.bundle import StudentBundle
from megakd.losses.objective import build_objective
from megakd.teachers.frozen import FrozenModel
from megakd.training.trainer import Trainer

BATCH = Batch({}, torch.tensor([1]), torch.ones(1, 1, dtype=torch.bool))
ALONE = ((Pass(),),)


class Student:
    """Gives the terms it is told to."""

    def __init__(self, told: list[Any], terms: Sequence[float] = ()) -> None:
        self.told, self.terms = told, list(terms)

    def forward_backward(
        self, batch: Batch, knowledge: Mapping[str, Knowledge], plan: Any, counts: Counts, **options
    ) -> dict[str, Tensor]:
        self.told.append(("forward_backward", tuple(knowledge), options["boundary"]))
        return {"term": torch.tensor(self.terms.pop(0) if self.terms else 1.0)}

    def step(self, learning_rate: float) -> Tensor:
        self.told.append(("step", learning_rate))
        return torch.tensor(3.0)


class Teacher:
    """Knows nothing."""

    def __init__(self, told: list[Any], name: str) -> None:
        self.told, self.name = told, name

    def __call__(self, batch: Batch) -> Knowledge:
        self.told.append(("asked", self.name))
        return Knowledge()

    def answers(self, batches: Sequence[Batch]) -> Iterator[Knowledge]:
        return map(self, batches)

    def prefetch(self) -> None:
        self.told.append(("next", self.name))

    def evict(self) -> None:
        self.told.append(("idle", self.name))


class Steering:
    """A strategy that plans different teachers at different steps."""

    def __init__(self, told: list[Any], plans: Sequence[tuple[Pass, ...]]) -> None:
        self.told, self.plans, self.reports = told, plans, []

    def passes(self, step: int) -> tuple[Pass, ...]:
        self.told.append(("plan", step))
        return self.plans[step % len(self.plans)]

    def before_update(self, step: int, student: Any) -> None:
        self.told.append(("before_update", step))

    def after_update(self, report: StepReport) -> None:
        self.told.append(("after_update", report.step))
        self.reports.append(report)


def trainer_of(told: list[Any], *, plans: Any = ALONE, terms: Any = (), teachers: Any = ()):
    return Trainer(
        student=Student(told, terms),
        teachers={name: Teacher(told, name) for name in teachers},
        strategy=Steering(told, plans),
        count_units=count_units,
        learning_rate=lambda step: 0.1 * step,
    )


def test_a_step_plans_learns_updates_and_reports_in_this_order():
    told = []

    trainer_of(told).train_step([BATCH, BATCH, BATCH])

    assert told == [
        ("plan", 0),
        ("forward_backward", (), False),
        ("forward_backward", (), False),
        ("forward_backward", (), True),
        ("before_update", 0),
        ("step", 0.0),
        ("after_update", 0),
    ]


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


def test_a_report_sums_the_terms_of_its_own_micro_batches():
    trainer = trainer_of([], terms=(0.5, 1.0, 5.0))

    first, second = map(trainer.train_step, ([BATCH, BATCH], [BATCH]))

    assert (first.parts["term"].item(), second.parts["term"].item()) == (1.5, 5.0)
    assert numbers(first.counts) == (2, 2, 2)
    assert first.gradient_norm is not None
    assert trainer.strategy.reports == [first, second]  # type: ignore[attr-defined]


class Body(nn.Module):
    """An embedding and one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([nn.Tanh()])

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return BaseModelOutput(self.layers[0](self.embedding(input_ids)))


class Tiny(nn.Module):
    """Answers as a classifier, a regressor or (by its parts) a causal LM does."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="llama", num_hidden_layers=1, _attn_implementation="sdpa"
        )
        self.model = Body()
        self.lm_head = nn.Linear(4, 9, bias=False)
        self.classifier = nn.Linear(4, outputs)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        return SimpleNamespace(logits=self.classifier(hidden[:, 0]))


class Learner:
    """A student engine without DeepSpeed: the real bundle, plain gradient descent."""

    def __init__(self, bundle: StudentBundle) -> None:
        self.bundle = bundle

    def forward_backward(self, *seen: Any, boundary: bool) -> dict[str, Tensor]:
        losses = self.bundle(*seen)
        losses.total.backward()
        return losses.parts

    def step(self, learning_rate: float) -> None:
        with torch.no_grad():
            for parameter in self.bundle.parameters():
                if parameter.grad is not None:
                    parameter.sub_(learning_rate * parameter.grad)


HARD, SCORE = HardCrossEntropy(loss="hard_cross_entropy"), HardMse(loss="hard_mse")
SOFT = (SoftTargetKl(loss="soft_target_kl"), SoftTargetJsd(loss="soft_target_jsd"))
HIDDEN = (HiddenMse(loss="hidden_mse"), HiddenCosine(loss="hidden_cosine"))
TASKS = {
    "classification": ((HARD, *SOFT, *HIDDEN), torch.tensor([1, IGNORE])),
    "regression": (
        (SCORE, SoftTargetMse(loss="soft_target_mse"), *HIDDEN),
        torch.tensor([1.5, math.nan]),
    ),
    "causal_lm": ((HARD, *SOFT, *HIDDEN), torch.tensor([[1, 2, 3], [4, IGNORE, IGNORE]])),
}


@pytest.mark.parametrize("task", TASKS)
def test_no_operation_of_a_step_makes_the_host_wait_for_the_device(task):
    terms, labels = TASKS[task]
    outputs = 1 if task == "regression" else 3
    shape = Shape(1, 4, outputs)
    objective = build_objective(terms, task, shape, shape)  # type: ignore[arg-type]
    order = (2, 0, 1) if task == "classification" else None
    frozen = FrozenModel(Tiny(outputs), needs=objective.needs, label_order=order)
    frozen.requires_grad_(requires_grad=False)
    lm_head = SimpleNamespace(read=lambda: (torch.ones(9, 4), None), warp=LogitWarp())

    class Headed(Teacher):
        def __call__(self, batch: Batch) -> Knowledge:
            return frozen(batch)._replace(head=lm_head)

    trainer = Trainer(
        student=Learner(StudentBundle({"student": Tiny(outputs)}, objective, world_size=1)),
        teachers={"teacher": Headed([], "teacher")},
        strategy=Constant((Pass(teacher="teacher"),)),
        count_units=count_units,
        learning_rate=lambda step: 0.1 / (1 + step),
    )
    batch = Batch(
        {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]])},
        labels,
        torch.tensor([[True, True, True], [True, True, False]]),
    )

    with no_waiting():
        reports = [trainer.train_step([batch, batch]) for _ in range(2)]

    assert all(torch.isfinite(value) for report in reports for value in report.parts.values())


@pytest.mark.parametrize(
    "reads",
    [bool, Tensor.item, Tensor.nonzero, lambda t: t[t > 0], lambda t: t.masked_select(t > 0)],
    ids=["branch", "item", "nonzero", "mask", "masked_select"],
)
def test_that_check_notices_what_makes_the_host_wait(reads):
    with Waiting(), pytest.raises(AssertionError, match="makes the host wait"):
        reads(torch.ones(()) if reads in (bool, Tensor.item) else torch.ones(2))
