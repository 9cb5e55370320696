"""Meter for a stage's log: every loss term, gradient norm, speed, time shares and problems."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megakd.contract.batch import add_parts, copied_to
from megakd.contract.stage import Stage, StepReport
from megakd.contract.unit_counts import SOURCE_UNITS
from megakd.engine.collectives import all_reduce_, gather
from megakd.engine.distributed import Ranks
from megakd.engine.memory import peak_memory_bytes
from megakd.errors import TrainingError
from megakd.losses.objective import WEIGHTED_LOSS, Objective
from megakd.teachers.watched import failed_teachers
from megakd.training.progress import LEARNING_RATE, LOSS, MEMORY_BYTES, TOKENS_PER_SECOND
from megakd.training.rank_load import RankLoad
from megakd.training.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
_NEVER = 2**62
_REPORTS = 100
"""Reports that are kept before they are added up."""


class TrainMeter:
    """Meter that gathers reports on the device and reads them at logging steps only.

    The reports of many steps are added up at once: the same additions in every step, between all
    that a step does, would take several times as long.
    """

    def __init__(self, objective: Objective, trainer: Trainer, stage: Stage, ranks: Ranks) -> None:
        self._objective, self._trainer, self._ranks = objective, trainer, ranks
        self._stage = stage.name
        self.load = RankLoad(trainer, stage.name, ranks)
        # Under fp16 a gradient may overflow: DeepSpeed skips that step and lowers its scale.
        self._scales_loss = bool(stage.train.fp16)
        self._reports: list[StepReport] = []
        self._parts: dict[str, Tensor] = {}
        self._counts: dict[str, int | Tensor] = {}
        self._steps = 0
        self._tokens: int | Tensor = 0
        self._without_targets: int | Tensor = 0
        self._norm: Tensor | None = None
        self._first_bad = torch.full((), _NEVER, device=ranks.device)
        self._since = time.perf_counter()
        self._paused_s = self._teacher_s = self._waited_s = 0.0
        self._warned = False
        self._total_tokens = 0
        self._total_seconds = self._elapsed_before = self._window_before = 0.0
        self._began = time.perf_counter()

    def begin(self) -> None:
        self._began = time.perf_counter()
        self._since, self._window_before = self._began - self._window_before, 0.0
        self.load.begin()

    def add(self, report: StepReport) -> None:
        """Add one step's report without reading from the device."""
        self._reports.append(report)
        if len(self._reports) == _REPORTS:
            self._add_up()

    def _add_up(self) -> None:
        for report in self._reports:
            add_parts(self._parts, report.parts)
            for name in report.parts:
                self._counts[name] = self._counts.get(name, 0) + self._has_value(name, report)
            self._steps += 1
            self._norm = report.gradient_norm
            self._first_bad = self._first_bad.minimum(self._bad_step(report))
            empty = (report.counts["targets"] == 0).long()
            self._tokens = self._tokens + report.counts["tokens"]
            self._without_targets = self._without_targets + empty
        self._reports.clear()

    def _bad_step(self, report: StepReport) -> Tensor:
        """Return the step if its loss or its gradient is not finite, else `_NEVER`."""
        norm, bad = report.gradient_norm, ~torch.isfinite(report.parts[WEIGHTED_LOSS])
        if norm is not None and not self._scales_loss:
            # DeepSpeed skips a step whose gradient is not finite; its norm is -1 or infinite then.
            bad = bad | copied_to(~torch.isfinite(norm) | (norm < 0), bad.device)
        return torch.where(bad, report.step, _NEVER)

    def _has_value(self, name: str, report: StepReport) -> int | Tensor:
        # A step without texts of a source has no value for the term of this source.
        unit = self._objective.units.get(name.rpartition("/")[2])
        if unit is None or unit not in SOURCE_UNITS.values():
            return 1
        return (report.counts[unit] > 0).long()

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        with self.load.paused():
            yield
        self._paused_s += time.perf_counter() - began

    def scalars(self, *, waited_s: float) -> dict[str, float]:
        """Return means since the last call, over ranks and the steps with a value; a collective."""
        self._add_up()
        tokens = int(self._tokens)  # waits for the device, before the time is read
        seconds = max(1e-9, time.perf_counter() - self._since - self._paused_s)
        values = [self._parts[name].float().reshape(1) for name in self._parts]
        sums = all_reduce_(torch.cat([*values, self.load.mine(seconds)])).tolist()
        means = {
            name: value / int(self._counts[name])
            for name, value in zip(self._parts, sums, strict=False)
            if int(self._counts[name])
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
            **self.load.scalars(sums[len(values) :], tokens_per_s=tokens / seconds),
        }
        if self._norm is not None:
            scalars["train/gradient_norm"] = float(self._norm)
        if self._scales_loss:
            scalars |= self._trainer.student.scaling()
        self._teacher_s, self._waited_s = teacher_s, waited_s
        self._start_window()
        return scalars

    def _start_window(self) -> None:
        self._parts, self._counts = {}, {}
        self._steps = self._tokens = self._without_targets = 0
        self._since, self._paused_s = time.perf_counter(), 0.0

    def _warn_of_empty_steps(self) -> None:
        wants_targets = "targets" in self._objective.units.values()
        if self._warned or not wants_targets:
            return
        empty = int(self._without_targets)
        if empty and self._ranks.is_main:
            logger.warning(
                "%s: %d of the last %d steps had no label at all (all masked) and contribute zero "
                "(logged once)",
                self._stage,
                empty,
                self._steps,
            )
        self._warned = bool(empty)

    def check_finite(self, newest: Callable[[], Path | None]) -> None:
        """Raise TrainingError at a loss or gradient that is not finite; a collective.

        Args:
            newest: returns the last good checkpoint; a collective.
        """
        self._add_up()
        step = -int(all_reduce_(-self._first_bad, largest=True))
        if step != _NEVER:
            good = newest()
            raise TrainingError(
                f"{self._stage}: the loss or its gradient is not finite (NaN or infinite) at step "
                f"{step + 1}; the last good checkpoint is "
                f"{good or 'none (nothing was saved yet)'}; {self._remedy()}, then start again"
            )

    def _remedy(self) -> str:
        # A teacher with NaN outputs is named before anything else.
        failed = failed_teachers(self._trainer.teachers, self._ranks.device)
        if failed:
            return (
                f"the outputs of {', '.join(failed)} are not finite: check the weights, or set the "
                "dtype to bf16 or fp32"
            )
        return "lower train.learning_rate or check the data"

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
        parts = {name: value.cpu() for name, value in self._parts.items()}
        mine = {
            "parts": parts,
            "counts": {name: int(count) for name, count in self._counts.items()},
            "steps": self._steps,
            "tokens": int(self._tokens),
            "without_targets": int(self._without_targets),
            "operations": self.load.state(),
            "seconds": time.perf_counter() - self._since - self._paused_s,
        }
        return gather(mine)

    def load_window_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore what `window_state` returned, possibly with other ranks.

        Only the parts and the seconds differ between ranks, and only the sum of the parts counts.
        """
        rank, device = self._ranks.rank, self._ranks.device
        is_same = len(states) == self._ranks.world_size
        mine = [states[rank]] if is_same else states if rank == 0 else []
        state = states[0]
        self._parts = {
            name: sum(
                (each["parts"][name].to(device) for each in mine),
                torch.zeros_like(value, device=device),
            )
            for name, value in state["parts"].items()
        }
        self.load.load_state([each.get("operations", (0.0, 0.0, 0.0)) for each in states])
        self._counts = dict(state["counts"])
        self._steps, self._window_before = state["steps"], state["seconds"]
        self._tokens, self._without_targets = state["tokens"] or 0, state["without_targets"] or 0
