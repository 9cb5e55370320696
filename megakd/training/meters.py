"""Meter for a stage's log: every loss term, gradient norm, speed, time shares and problems."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megakd.contract.batch import SOURCE_UNITS
from megakd.contract.stage import Stage, StepReport
from megakd.engine.collectives import all_reduce_
from megakd.engine.distributed import Ranks
from megakd.engine.memory import device_name, peak_memory_bytes
from megakd.engine.student import OVERFLOWS
from megakd.errors import TrainingError
from megakd.losses.objective import WEIGHTED_LOSS, Objective
from megakd.training.operations import StepWork, peak_tflops
from megakd.training.progress import LEARNING_RATE, LOSS, MEMORY_BYTES, TOKENS_PER_SECOND
from megakd.training.trainer import Trainer

logger = logging.getLogger(__name__)
_NEVER = 2**62
_REPORTS = 100
"""Reports that are kept before they are read."""
_MOST_SKIPPED = 32
"""Steps in a row that may overflow under fp16: by then, any loss scale has been halved to 1."""


@dataclass
class LogWindow:
    """Sums over the steps since the last log; it begins at `since`, less what `paused_s` takes."""

    since: float
    parts: dict[str, float] = field(default_factory=dict[str, float])
    with_value: Counter[str] = field(default_factory=Counter[str])
    student_operations: float = 0.0
    teacher_operations: float = 0.0
    steps: int = 0
    tokens: int = 0
    without_targets: int = 0
    paused_s: float = 0.0


class TrainMeter:
    """Meter that keeps the reports of steps and reads them at logging steps only.

    At most `_REPORTS` of them are kept: then they are read, which waits for the device.
    `divides_rows`: as in `StepWork`.
    """

    def __init__(
        self,
        objective: Objective,
        trainer: Trainer,
        stage: Stage,
        ranks: Ranks,
        *,
        divides_rows: bool = False,
    ) -> None:
        self._objective, self._trainer, self._ranks = objective, trainer, ranks
        self._stage = stage.name
        self._work = StepWork(trainer, divides_rows=divides_rows)
        self._peak = peak_tflops(device_name(ranks.device))
        # Under fp16 a gradient may overflow: DeepSpeed skips that step and lowers its scale.
        self._scales_loss = bool(stage.train.fp16)
        self._reports: list[StepReport] = []
        self._norm: float | None = None
        self._first_bad, self._skipped, self._warned = _NEVER, 0, False
        self._teacher_s = self._waited_s = 0.0
        self._total_tokens, self._total_seconds, self._elapsed_before = 0, 0.0, 0.0
        self.begin()

    def begin(self) -> None:
        self._window = LogWindow(time.perf_counter())
        self._began = self._window.since

    def add(self, report: StepReport) -> None:
        self._reports.append(report)
        if len(self._reports) == _REPORTS:
            self._add_up()

    def _add_up(self) -> None:
        reports, self._reports = self._reports, []
        window, units = self._window, self._objective.units
        tensors = (
            [part for report in reports for part in report.parts.values()],
            [count for report in reports for count in report.counts.values()],
            [r.gradient_norm for r in reports if r.gradient_norm is not None],
        )
        # One copy from the device for all values of a kind.
        parts, counts, norms = (iter(torch.stack(t).tolist() if t else ()) for t in tensors)
        for report in reports:
            count = {unit: int(next(counts)) for unit in report.counts}
            loss = math.nan
            for name in report.parts:
                value = next(parts)
                loss = value if name == WEIGHTED_LOSS else loss
                window.parts[name] = window.parts.get(name, 0.0) + value
                # A step without texts of a source has no value for the term of this source.
                unit = units.get(name.rpartition("/")[2])
                has_value = unit is None or unit not in SOURCE_UNITS.values() or count[unit] > 0
                window.with_value[name] += has_value
            window.steps += 1
            window.tokens += count["tokens"]
            window.without_targets += count["targets"] == 0
            student, teacher = self._work.of(report.passes, count)
            window.student_operations += student
            window.teacher_operations += teacher
            norm = self._norm = None if report.gradient_norm is None else next(norms)
            # DeepSpeed skips a step whose gradient is not finite; its norm is -1 or infinite then.
            is_skipped = norm is not None and not 0 <= norm < math.inf
            self._skipped = self._skipped + 1 if is_skipped else 0
            most = _MOST_SKIPPED if self._scales_loss else 1
            if not math.isfinite(loss) or self._skipped >= most:
                self._first_bad = min(self._first_bad, report.step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._window.paused_s += time.perf_counter() - began

    def scalars(self, *, waited_s: float) -> dict[str, float]:
        """Return means since the last call, over ranks and the steps with a value; a collective."""
        self._add_up()
        window, trainer = self._window, self._trainer
        seconds = max(1e-9, time.perf_counter() - window.since - window.paused_s)
        sums = all_reduce_(torch.tensor([*window.parts.values()], device=self._ranks.device))
        means = {
            name: value / window.with_value[name]
            for name, value in zip(window.parts, sums.tolist(), strict=True)
            if window.with_value[name]
        }
        self._total_tokens += window.tokens
        self._total_seconds += seconds
        has_labels = "targets" in self._objective.units.values()
        if window.without_targets and has_labels and not self._warned:
            self._warned = True
            if self._ranks.is_main:
                logger.warning(
                    "%s: %d of the last %d steps had no label, and terms on labels add nothing "
                    "to them (logged once)",
                    *(self._stage, window.without_targets, window.steps),
                )
        teacher_s = trainer.teacher_clock.seconds()
        scalars = {
            LOSS: means.pop(WEIGHTED_LOSS, 0.0),
            **{f"train/{name}": value for name, value in means.items()},
            LEARNING_RATE: trainer.learning_rate(trainer.step - 1),
            TOKENS_PER_SECOND: window.tokens / seconds,
            "train/step_seconds": seconds / max(1, window.steps),
            "train/teacher_share": (teacher_s - self._teacher_s) / seconds,
            "train/data_share": (waited_s - self._waited_s) / seconds,
            MEMORY_BYTES: float(peak_memory_bytes(self._ranks.device)),
        }
        by_rank = 1e12 * seconds * self._ranks.world_size
        rates = {
            "train/student_tflops": window.student_operations / by_rank,
            "train/teacher_tflops": window.teacher_operations / by_rank,
        }
        scalars |= {name: rate for name, rate in rates.items() if rate}
        if self._peak is not None:
            scalars["train/peak_share"] = sum(rates.values()) / self._peak
        if self._norm is not None:
            scalars["train/gradient_norm"] = self._norm
        if self._scales_loss:
            scalars |= trainer.student.scaling()
        self._teacher_s, self._waited_s = teacher_s, waited_s
        self._window = LogWindow(time.perf_counter())
        return scalars

    def check_finite(self, newest: Callable[[], Path | None]) -> None:
        """Raise TrainingError at a loss or gradient that is not finite; a collective.

        `newest`, a collective, returns the last good checkpoint.
        """
        self._add_up()
        bad = torch.tensor(-self._first_bad, device=self._ranks.device)
        step = -int(all_reduce_(bad, largest=True))
        if step == _NEVER:
            return
        good, remedy = newest(), "lower train.learning_rate or check the data"
        # A teacher with NaN outputs is named before anything else.
        failed = self._trainer.watch.failed(self._ranks.device)
        if failed:
            remedy = (
                f"the outputs of {', '.join(failed)} are not finite: check the weights, or set the "
                "dtype to bf16 or fp32"
            )
        elif self._scales_loss and self._skipped >= _MOST_SKIPPED:
            remedy = OVERFLOWS
        raise TrainingError(
            f"{self._stage}: the loss or its gradient is not finite (NaN or infinite) at step "
            f"{step + 1}; the last good checkpoint is "
            f"{good or 'none (nothing was saved yet)'}; {remedy}, then start again"
        )

    def tokens_per_second(self) -> float:
        """Return the valid tokens of all ranks per second of training, over the whole stage."""
        return self._total_tokens / max(1e-9, self._total_seconds)

    def elapsed_seconds(self) -> float:
        """Return the wall-clock time of the stage over all its runs, with evaluations and saves."""
        return self._elapsed_before + time.perf_counter() - self._began

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self._total_tokens,
            "seconds": self._total_seconds,
            "elapsed": self.elapsed_seconds(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._total_tokens, self._total_seconds = state["tokens"], state["seconds"]
        self._elapsed_before = state["elapsed"]
