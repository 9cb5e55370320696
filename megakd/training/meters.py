"""Meter for a stage's log: every loss term, gradient norm, speed, time shares and problems."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakd.contract.batch import Unit
from megakd.contract.stage import Stage, StepReport
from megakd.contract.unit_counts import SOURCE_UNITS
from megakd.engine.collectives import all_reduce_, gather
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


class TrainMeter:
    """Meter that keeps the reports of steps and reads them at logging steps only.

    At most `_REPORTS` of them are kept: then they are read, which waits for the device.
    """

    def __init__(self, objective: Objective, trainer: Trainer, stage: Stage, ranks: Ranks) -> None:
        self._objective, self._trainer, self._ranks = objective, trainer, ranks
        self._stage = stage.name
        self._work, self._peak = StepWork(trainer), peak_tflops(device_name(ranks.device))
        self._operations = [0.0, 0.0]  # of students and of teachers
        # Under fp16 a gradient may overflow: DeepSpeed skips that step and lowers its scale.
        self._scales_loss = bool(stage.train.fp16)
        self._reports: list[StepReport] = []
        self._parts: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._steps = self._tokens = self._without_targets = 0
        self._norm: float | None = None
        self._first_bad = _NEVER
        self._skipped = 0
        self._since = time.perf_counter()
        self._paused_s = self._teacher_s = self._waited_s = 0.0
        self._warned = False
        self._total_tokens = 0
        self._total_seconds = self._elapsed_before = self._window_before = 0.0
        self._began = time.perf_counter()

    def begin(self) -> None:
        self._began = time.perf_counter()
        self._since, self._window_before = self._began - self._window_before, 0.0

    def add(self, report: StepReport) -> None:
        self._reports.append(report)
        if len(self._reports) == _REPORTS:
            self._add_up()

    def _add_up(self) -> None:
        reports, self._reports = self._reports, []
        parts = iter(_read([part for report in reports for part in report.parts.values()]))
        counts = iter(_read([count for report in reports for count in report.counts.values()]))
        norms = iter(_read([r.gradient_norm for r in reports if r.gradient_norm is not None]))
        for report in reports:
            of_step = {unit: int(next(counts)) for unit in report.counts}
            self._add(
                report.step,
                {name: next(parts) for name in report.parts},
                of_step,
                None if report.gradient_norm is None else next(norms),
            )
            both = zip(self._operations, self._work.of(report.passes, of_step), strict=True)
            self._operations = [before + more for before, more in both]

    def _add(
        self, step: int, parts: Mapping[str, float], counts: Mapping[Unit, int], norm: float | None
    ) -> None:
        for name, value in parts.items():
            # A step without texts of a source has no value for the term of this source.
            unit = self._objective.units.get(name.rpartition("/")[2])
            has_value = unit is None or unit not in SOURCE_UNITS.values() or counts[unit] > 0
            self._parts[name] = self._parts.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + has_value
        self._steps += 1
        self._norm = norm
        self._tokens += counts["tokens"]
        self._without_targets += counts["targets"] == 0
        # DeepSpeed skips a step whose gradient is not finite; its norm is -1 or infinite then.
        is_skipped = norm is not None and not 0 <= norm < math.inf
        self._skipped = self._skipped + 1 if is_skipped else 0
        most = _MOST_SKIPPED if self._scales_loss else 1
        if not math.isfinite(parts[WEIGHTED_LOSS]) or self._skipped >= most:
            self._first_bad = min(self._first_bad, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    def scalars(self, *, waited_s: float) -> dict[str, float]:
        """Return means since the last call, over ranks and the steps with a value; a collective."""
        self._add_up()
        tokens = self._tokens
        seconds = max(1e-9, time.perf_counter() - self._since - self._paused_s)
        values = torch.tensor([*self._parts.values()], device=self._ranks.device)
        means = {
            name: value / self._counts[name]
            for name, value in zip(self._parts, all_reduce_(values).tolist(), strict=True)
            if self._counts[name]
        }
        self._total_tokens += tokens
        self._total_seconds += seconds
        self._warn_of_empty_steps()
        teacher_s = self._trainer.teacher_clock.seconds()
        scalars = {
            LOSS: means.pop(WEIGHTED_LOSS, 0.0),
            **{f"train/{name}": value for name, value in means.items()},
            LEARNING_RATE: self._trainer.learning_rate(self._trainer.step - 1),
            TOKENS_PER_SECOND: tokens / seconds,
            "train/step_seconds": seconds / max(1, self._steps),
            "train/teacher_share": (teacher_s - self._teacher_s) / seconds,
            "train/data_share": (waited_s - self._waited_s) / seconds,
            MEMORY_BYTES: float(peak_memory_bytes(self._ranks.device)),
            **self._rates(seconds),
        }
        if self._norm is not None:
            scalars["train/gradient_norm"] = self._norm
        if self._scales_loss:
            scalars |= self._trainer.student.scaling()
        self._teacher_s, self._waited_s = teacher_s, waited_s
        self._parts, self._counts, self._operations = {}, {}, [0.0, 0.0]
        self._steps = self._tokens = self._without_targets = 0
        self._since, self._paused_s = time.perf_counter(), 0.0
        return scalars

    def _rates(self, seconds: float) -> dict[str, float]:
        names = ("train/student_tflops", "train/teacher_tflops")
        by_rank = 1e12 * seconds * self._ranks.world_size
        rates = {n: o / by_rank for n, o in zip(names, self._operations, strict=True) if o}
        share = {} if self._peak is None else {"train/peak_share": sum(rates.values()) / self._peak}
        return rates | share

    def _warn_of_empty_steps(self) -> None:
        empty, units = self._without_targets, self._objective.units.values()
        if self._warned or not empty or "targets" not in units:
            return
        self._warned = True
        if self._ranks.is_main:
            logger.warning(
                "%s: %d of the last %d steps had no label at all (all masked) and contribute zero "
                "(logged once)",
                self._stage,
                empty,
                self._steps,
            )

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

    def window_state(self) -> list[dict[str, Any]]:
        """Return all ranks' values since the last logging step, before a save; a collective."""
        self._add_up()
        mine = {
            "parts": self._parts,
            "counts": self._counts,
            "steps": self._steps,
            "tokens": self._tokens,
            "without_targets": self._without_targets,
            "operations": self._operations,
            "seconds": time.perf_counter() - self._since - self._paused_s,
        }
        return gather(mine)

    def load_window_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore what `window_state` returned, possibly with other ranks.

        Only the parts and the seconds differ between ranks, and only the sum of the parts counts.
        """
        rank = self._ranks.rank
        is_same = len(states) == self._ranks.world_size
        mine = [states[rank]] if is_same else states if rank == 0 else []
        state = states[0]
        self._parts = {
            name: sum(float(each["parts"][name]) for each in mine) for name in state["parts"]
        }
        self._counts, self._operations = dict(state["counts"]), state["operations"]
        self._steps, self._window_before = state["steps"], state["seconds"]
        self._tokens, self._without_targets = state["tokens"], state["without_targets"]


def _read(scalars: list[Tensor]) -> list[float]:
    return torch.stack(scalars).tolist() if scalars else []
