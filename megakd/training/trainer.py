"""The one training loop. It knows no model, no loss, no teacher and no method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megakd.config.schedules import Schedule
from megakd.contract.batch import Batch, Counts, Knowledge, Losses
from megakd.contract.stage import Pass, StepReport, Strategy, Teacher, teacher_names
from megakd.engine.stopwatch import Stopwatch


class Learner(Protocol):
    """The student's engine, as the loop sees it."""

    def forward_backward(
        self,
        batch: Batch,
        knowledge: Mapping[str, Knowledge],
        plan: Sequence[Pass],
        counts: Counts,
        *,
        boundary: bool,
    ) -> Losses:
        """Adds one micro-batch to the step's gradient."""
        ...

    def step(self, learning_rate: float) -> None:
        """Applies the step's gradient."""
        ...

    def gradient_norm(self) -> Tensor | None:
        """Of the last step, before clipping."""
        ...


class Meter:
    """Sums what the losses report, on the device, until somebody reads it."""

    def __init__(self) -> None:
        self.first_bad_step: Tensor | None = None
        self.teacher = Stopwatch()
        self._parts: dict[str, Tensor] = {}

    def add(self, step: int, losses: Losses) -> None:
        """Takes one micro-batch; remembers the first step whose loss is not finite."""
        for name, value in losses.parts.items():
            self._parts[name] = self._parts[name] + value if name in self._parts else value
        total = losses.total.detach()
        if self.first_bad_step is None:
            self.first_bad_step = torch.full((), -1, dtype=torch.long, device=total.device)
        bad = ~torch.isfinite(total) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, step, self.first_bad_step)

    def take(self) -> dict[str, Tensor]:
        """This rank's share of the step's parts, and starts the next step."""
        parts, self._parts = self._parts, {}
        return parts


@dataclass
class Trainer:
    """Steps until told to stop.

    student: the engine that learns.
    teachers: by name, those that the strategy may plan.
    strategy: plans each step.
    count_units: micro-batches of this rank -> global unit counts, on the device.
    learning_rate: step -> rate.
    """

    student: Learner
    teachers: Mapping[str, Teacher]
    strategy: Strategy
    count_units: Callable[[Sequence[Batch]], Counts]
    learning_rate: Schedule
    step: int = 0
    meter: Meter = field(default_factory=Meter)

    def fit(self, steps: Iterable[Sequence[Batch]]) -> Iterator[StepReport]:
        """Takes one optimiser step per item of `steps` and yields its report.

        The caller logs, evaluates and saves between two steps; `self.step` is then the number
        of steps taken, which with the strategy's state is all that the loop must resume.
        """
        for batches in steps:
            yield self.train_step(batches)

    def train_step(self, batches: Sequence[Batch]) -> StepReport:
        """One optimiser step over this rank's micro-batches."""
        plan = self.strategy.passes(self.step)
        counts = self.count_units(batches)
        for batch, is_last in _mark_last(batches):
            knowledge = self._ask_teachers(plan, batch)
            if is_last:
                self._call_up(plan)
            losses = self.student.forward_backward(batch, knowledge, plan, counts, boundary=is_last)
            self.meter.add(self.step, losses)
        self.strategy.before_update(self.step, self.student)
        self.student.step(self.learning_rate(self.step))
        report = StepReport(
            step=self.step,
            parts=self.meter.take(),
            gradient_norm=self.student.gradient_norm(),
            counts=counts,
        )
        self.strategy.after_update(report)
        self.step += 1
        return report

    def _ask_teachers(self, plan: Sequence[Pass], batch: Batch) -> dict[str, Knowledge]:
        with self.meter.teacher.running():
            # A teacher that learns in this stage answers inside the student's engine.
            frozen = [name for name in teacher_names(plan) if name in self.teachers]
            return {name: self.teachers[name](batch.of(name)) for name in frozen}

    def _call_up(self, plan: Sequence[Pass]) -> None:
        """The next step's teachers make ready while the student learns, and the others rest."""
        if self.teachers.keys() <= {*teacher_names(plan)}:
            return
        upcoming = teacher_names(self.strategy.passes(self.step + 1))
        # Who rests goes first: there is room for the others then.
        for name in sorted(self.teachers, key=lambda name: name in upcoming):
            teacher = self.teachers[name]
            (teacher.prefetch if name in upcoming else teacher.evict)()

    def state_dict(self) -> dict[str, Any]:
        """What the loop must resume, the same on every rank."""
        return {"step": self.step, "strategy": self.strategy.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self.step = state["step"]
        self.strategy.load_state_dict(state["strategy"])


def _mark_last(batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
    for index, batch in enumerate(batches):
        yield batch, index == len(batches) - 1
