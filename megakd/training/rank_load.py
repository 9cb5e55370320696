"""The load of every rank: seconds of computing and waiting, and operations per second."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median_low
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megakd.contract.stage import StepReport
from megakd.engine.collectives import gather, node_name
from megakd.engine.distributed import Ranks
from megakd.engine.memory import device_name
from megakd.engine.waiting import seconds_in_collectives
from megakd.scoring.watches import LOGS, SlowRank
from megakd.training.operations import StepOperations, passes_of, peak_tflops

if TYPE_CHECKING:
    from megakd.training.trainer import Trainer

logger = logging.getLogger(__name__)


class RankLoad:
    """The load of each rank between two logs.

    Operations are counted in the first, second, fourth, … step of the stage, because to see every
    operator takes time; a token is taken to need as many in the other steps. Under the mode that
    counts, a backward rounds otherwise: a resumed run has to count in the same steps.
    """

    def __init__(self, trainer: Trainer, stage: str, ranks: Ranks) -> None:
        self._trainer, self._stage, self._ranks = trainer, stage, ranks
        self._operations = StepOperations(lambda: trainer.teacher_clock.is_running)
        self._peak = peak_tflops(device_name(ranks.device))
        self._counted_tokens: int | Tensor = 0
        self._slow = SlowRank()
        self._in_collectives = 0.0

    def begin(self) -> None:
        self._in_collectives = seconds_in_collectives()

    def watch(self, take: Callable[[], StepReport]) -> StepReport:
        """Take a step and return its report."""
        number = self._trainer.step + 1
        if number & (number - 1):
            return take()
        with self._operations:
            report = take()
        self._counted_tokens = self._counted_tokens + report.counts["tokens"]
        return report

    def state(self) -> list[float]:
        """Return this rank's operations of student and teacher, and the tokens of all ranks."""
        counted = self._operations
        return [counted.student, counted.teacher, float(self._counted_tokens)]

    def load_state(self, states: Sequence[Sequence[float]]) -> None:
        """Restore what `state` returned on each of the ranks that wrote a checkpoint."""
        world, rank = self._ranks.world_size, self._ranks.rank
        student, teacher, tokens = zip(*states, strict=True)
        counted = self._operations
        if len(states) == world:
            counted.student, counted.teacher = student[rank], teacher[rank]
        else:
            counted.student, counted.teacher = sum(student) / world, sum(teacher) / world
        self._counted_tokens = int(tokens[0])

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = seconds_in_collectives()
        yield
        self._in_collectives += seconds_in_collectives() - before

    def mine(self, seconds: float) -> Tensor:
        """Return what the ranks sum at a log, [2 + 2 * ranks]: operations, seconds by rank."""
        world, now = self._ranks.world_size, seconds_in_collectives()
        values = torch.zeros(2 + 2 * world)
        student = self._operations.student * passes_of(self._trainer.student.bundle)
        values[0], values[1] = student / 1e12, self._operations.teacher / 1e12
        values[2 + self._ranks.rank] = seconds
        values[2 + world + self._ranks.rank] = now - self._in_collectives
        self._in_collectives = now
        return values.to(self._ranks.device)

    def scalars(self, sums: Sequence[float], *, tokens_per_s: float) -> dict[str, float]:
        """Return the numbers of a log, and warn of a slow rank; a collective if there is one."""
        world = self._ranks.world_size
        share = tokens_per_s / max(1, int(self._counted_tokens)) / world
        numbers = self._rates(sums[0] * share, sums[1] * share)
        if world == 1:
            return numbers
        seconds, waited = sums[2 : 2 + world], sums[2 + world :]
        # The rank that others wait for needs the least time, that of the transfer.
        waiting = [time - min(waited) for time in waited]
        computing = [max(0.0, one - time) for one, time in zip(seconds, waiting, strict=True)]
        self._tell(computing)
        for rank in range(world):
            numbers[f"ranks/{rank}/computing_seconds"] = computing[rank]
            numbers[f"ranks/{rank}/waiting_seconds"] = waiting[rank]
        return numbers

    def _rates(self, student: float, teacher: float) -> dict[str, float]:
        rates = {"train/student_tflops": student, "train/teacher_tflops": teacher}
        rates = {name: rate for name, rate in rates.items() if rate}
        if self._peak is not None:
            rates["train/peak_share"] = sum(rates.values()) / self._peak
        return rates

    def _tell(self, computing: Sequence[float]) -> None:
        slow = self._slow.add(computing)
        if slow is None:
            return
        names = gather(node_name())
        if self._ranks.is_main:
            logger.warning(
                "%s: rank %d on %s is slow: %.2f s of computing since the last log, where the "
                "median rank needs %.2f s, and %d logs in a row; the other ranks wait for it. Look "
                "for other work on that machine, its temperature and its clock",
                *(self._stage, slow, names[slow], computing[slow]),
                *(median_low(computing), LOGS),
            )
