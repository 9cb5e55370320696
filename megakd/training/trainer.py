"""One step of training, which depends on no model, no loss, no teacher and no method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megakd.config.sections import Schedule
from megakd.data.batch import Batch, Counts, Outputs, Pass, Teacher, add_parts, teacher_names
from megakd.engine.collectives import all_reduce_
from megakd.stage import StepReport, Strategy

if TYPE_CHECKING:
    from megakd.training.student import StudentEngine


class AnswerWatch:
    """By teacher, a sum on the device that stays not finite after an answer that was not.

    The error message can then name the teacher instead of the learning rate as the cause.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}

    def add(self, outputs: Mapping[str, Outputs], batch: Batch) -> None:
        """Update the sums with the answers to a micro-batch, without a device sync."""
        for name, answer in outputs.items():
            self._sums[name] = self._sums.get(name, 0.0) + _sum_of(answer, batch.for_role(name))

    def failed(self, device: torch.device) -> list[str]:
        """Return the teachers with an answer that was not finite on any rank; a collective."""
        if not self._sums:
            return []
        flags = [float(not math.isfinite(total)) for total in self._sums.values()]
        seen = all_reduce_(torch.tensor(flags, device=device), largest=True).tolist()
        return [name for name, flag in zip(self._sums, seen, strict=True) if flag]


def _sum_of(answer: Outputs, batch: Batch) -> Tensor | float:
    # Over the rows that count, in fp32, in which fp16 does not overflow.
    valid = batch.valid
    if answer.logits is not None:
        values, counts = answer.logits, valid.any(dim=1)  # [B, C]
    elif answer.hidden is not None and batch.targets is not None:
        values = answer.hidden  # [N, D]
        counts = valid.flatten()[batch.targets]
    elif answer.hidden is not None:
        values, counts = answer.hidden, valid  # [B, T, D]
    else:
        return 0.0
    return values.sum(dim=-1, dtype=torch.float32).where(counts, 0.0).sum()


class Stopwatch:
    """Sum of the time inside `running()`; on GPUs measured by events, read only in `seconds`."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if not torch.cuda.is_available():
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        yield
        ended.record()
        self._pending.append((began, ended))

    def seconds(self) -> float:
        """Return the time so far; on a GPU this waits for the last event, so call it rarely."""
        for began, ended in self._pending:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        self._pending.clear()
        return self._seconds


@dataclass
class Trainer:
    """Takes one optimizer step after another; `strategy` plans each step.

    The caller logs, evaluates and saves between two steps. The state of the trainer is `step`, the
    number of steps taken, and that of the strategy.

    sum_counts: function from the micro-batches of this rank to the unit counts of all ranks, on the
        device; votes of the ranks ride on its all-reduce (`StepVotes`).
    teacher_clock: time that the device waits for the teachers.
    watch: whether all answers of the teachers were finite.
    """

    student: StudentEngine
    teachers: Mapping[str, Teacher]
    strategy: Strategy
    sum_counts: Callable[[Sequence[Batch]], Counts]
    learning_rate: Schedule
    step: int = 0
    teacher_clock: Stopwatch = field(default_factory=Stopwatch)
    watch: AnswerWatch = field(default_factory=AnswerWatch)

    def train_step(self, batches: Sequence[Batch]) -> StepReport:
        """Take an optimizer step on the micro-batches and return its report."""
        plan = self.strategy.passes(self.step)
        counts, parts = self.sum_counts(batches), dict[str, Tensor]()
        for index, (batch, passes, outputs) in enumerate(self._answered(plan, batches), start=1):
            is_last = index == len(batches)
            if is_last:
                self._prefetch(plan)
            add_parts(
                parts,
                self.student.forward_backward(batch, outputs, passes, counts, boundary=is_last),
            )
        self.strategy.before_update(self.step, self.student)
        norm = self.student.step(self.learning_rate(self.step))
        report = StepReport(
            step=self.step, parts=parts, gradient_norm=norm, counts=counts, passes=plan
        )
        report = replace(report, scalars=self.strategy.after_update(report))
        self.step += 1
        return report

    def _answered(
        self, plan: Sequence[Pass], batches: Sequence[Batch]
    ) -> Iterator[tuple[Batch, Sequence[Pass], dict[str, Outputs]]]:
        # A micro-batch whose rows name their teacher has the passes of this teacher alone.
        answers = {
            name: self.teachers[name].answers(
                [batch.for_role(name) for batch in batches if batch.teacher in (None, name)]
            )
            for name in self._frozen(plan)
        }
        for batch in batches:
            passes = [one for one in plan if batch.teacher in (None, one.teacher)]
            with self.teacher_clock.running():
                outputs = {name: next(answers[name]) for name in self._frozen(passes)}
                self.watch.add(outputs, batch)
            yield batch, passes, outputs

    def ask_teachers(self, plan: Sequence[Pass], batch: Batch) -> dict[str, Outputs]:
        """Return the outputs of the frozen teachers of the passes for a held-out micro-batch."""
        outputs = {name: self.teachers[name](batch.for_role(name)) for name in self._frozen(plan)}
        self.watch.add(outputs, batch)
        return outputs

    def _frozen(self, plan: Sequence[Pass]) -> list[str]:
        return [name for name in teacher_names(plan) if name in self.teachers]

    def _prefetch(self, plan: Sequence[Pass]) -> None:
        # The teachers of the next step are fetched while the student learns.
        if self.teachers.keys() <= {*teacher_names(plan)}:
            return
        upcoming = teacher_names(self.strategy.passes(self.step + 1))
        # Evict first, to make room for the prefetched teachers.
        for name in sorted(self.teachers, key=lambda name: name in upcoming):
            teacher = self.teachers[name]
            (teacher.prefetch if name in upcoming else teacher.evict)()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "strategy": self.strategy.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.strategy.load_state_dict(state["strategy"])
