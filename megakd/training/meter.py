"""Loss terms, speed, operations and problems of the steps between two lines of the log.

A forward takes 2 operations per token for every weight that multiplies it, and 4 for every column
of every layer and token that it attends to; a backward takes as many again for the inputs of a
product, and for its weight if that learns. A student's step is thus the usual 6·N per token.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from megakd.config.terms import Unit
from megakd.data.batch import SOURCE_UNITS, Pass, teacher_names
from megakd.engine.collectives import all_reduce_
from megakd.engine.distributed import Ranks
from megakd.engine.memory import device_name, peak_memory_bytes
from megakd.engine.sharding import full_shape
from megakd.errors import TrainingError
from megakd.losses.objective import WEIGHTED_LOSS, Objective
from megakd.models.elastic import weight_axes
from megakd.models.structure import architecture_of
from megakd.models.views import View
from megakd.stage import Stage, StepReport
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.student import OVERFLOWS
from megakd.training.trainer import Trainer

if TYPE_CHECKING:
    from megakd.losses.bundle import StudentBundle
from megakd.training.log import LEARNING_RATE, LOSS, MEMORY_BYTES, TOKENS_PER_SECOND

logger = logging.getLogger(__name__)


PEAK_TFLOPS = {
    "B200": 2250.0, "H200 NVL": 835.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0,
    "H100": 989.0, "H800": 989.0, "H20": 148.0, "A100": 312.0, "A800": 312.0, "A40": 149.7,
    "A10G": 70.0, "A10": 125.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "V100": 125.0,
    "T4": 65.0, "MI300X": 1307.0,
}  # fmt: skip
"""Dense products of 16 bits by device, 1e12 operations per second, from the makers' data sheets."""


def peak_tflops(device: str) -> float | None:
    """Return the rate of a device by its name; None if it is not known."""
    return next((p for name, p in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device)), None)


def work_of(
    model: PreTrainedModel, view: View | None = None, *, learns: bool = False
) -> tuple[int, int]:
    """Return how often a token is multiplied by a weight, and the columns of all layers.

    view: a part of the model that runs alone. learns: counts a backward too.
    """
    architecture, weights = architecture_of(model.config), 0
    axes = {} if view is None else weight_axes(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):  # a token reads a row, and multiplies nothing
            continue
        for name, weight in module.named_parameters(path, recurse=False):
            shape = list(full_shape(weight))
            for place, axis in enumerate(axes.get(name, ())):
                length = None if axis is None else axis.length(view)
                shape[place] = shape[place] if length is None else length
            if len(shape) == 3 and hasattr(type(module), "_apply_gate"):  # of all experts
                shape[0] = getattr(model.config, "num_experts_per_tok", shape[0])
            if len(shape) > 1:
                weights += math.prod(shape) * (2 + weight.requires_grad if learns else 1)
    layers = architecture.number_of_layers(model.config)
    return weights, (3 if learns else 1) * layers * architecture.hidden_width(model.config)


class StepWork:
    """The operations of the steps of a stage, by the passes of a step.

    divides_rows: whether a teacher reads a part of the rows, or every teacher reads all.
    """

    def __init__(self, trainer: Trainer, *, divides_rows: bool) -> None:
        self._trainer, self._divides_rows = trainer, divides_rows
        self._known: dict[tuple[str, str | None], tuple[int, int]] = {}

    def operations(self, plan: Sequence[Pass], counts: Mapping[Unit, int]) -> tuple[float, float]:
        """Return the operations of students and of teachers in a step, over all ranks.

        A model that learns beside the student counts as a student, and an answer from a cache or a
        server as nothing.
        """
        bundle, names = cast("StudentBundle", self._trainer.student.bundle), teacher_names(plan)
        tokens, length = counts["tokens"], counts["tokens"] / max(1, counts["examples"])
        passes = {(one.learner or bundle.role, one.view) for one in plan}
        work = {True: 0.0, False: 0.0}
        for name, view in passes | {(name, None) for name in names}:
            learns = name in bundle.by_role
            # A teacher that is no model of its own is the student without its adapters.
            model = bundle.by_role.get(name) or self._trainer.teachers.get(name, bundle.student)
            model = model.model if isinstance(model, FrozenTeacher) else model
            if isinstance(model, PreTrainedModel):
                if (name, view) not in self._known:
                    part = None if view is None else bundle.views[view]
                    self._known[name, view] = work_of(model, part, learns=learns)
                weights, columns = self._known[name, view]
                work[learns] += tokens * (2 * weights + 4 * columns * length)
        readers = len(names) if self._divides_rows else 1
        return work[True], work[False] / max(1, readers)


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
    of_strategy: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
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
            for name, value in report.scalars.items():
                window.of_strategy[name].append(value)
            window.steps += 1
            window.tokens += count["tokens"]
            window.without_targets += count["targets"] == 0
            student, teacher = self._work.operations(report.passes, count)
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
            logger.warning(
                "%s: %d of the last %d steps had no label, and terms on labels add nothing to them "
                "(logged once)",
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
        scalars |= {name: fmean(values) for name, values in window.of_strategy.items()}
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
