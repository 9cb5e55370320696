"""What a stage logs: loss terms, speed, operations and problems, in files, trackers and lines.

Each stage is a run of its own, so that its steps begin at 0 and a resumed stage continues its
curve. A service that fails is told of once, and the training goes on without it.

A forward takes 2 operations per token for every weight that multiplies it, and 4 for every column
of every layer and token that it attends to; a backward takes as many again for the inputs of a
product, and for its weight if that learns. A student's step is thus the usual 6·N per token.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import sys
import time
import uuid
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
from megakd.errors import ConfigError, MegakdError, TrainingError, one_line
from megakd.losses.objective import WEIGHTED_LOSS, Objective
from megakd.models.elastic import weight_axes
from megakd.models.generation import TOKENS_PER_TEXT, TRUNCATED
from megakd.models.structure import architecture_of
from megakd.models.views import View
from megakd.process import files
from megakd.stage import Stage, StepReport
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.student import OVERFLOWS
from megakd.training.trainer import Trainer

if TYPE_CHECKING:
    from tqdm import tqdm

    from megakd.losses.bundle import StudentBundle

logger = logging.getLogger(__name__)

_RUN_IDS = "trackers.json"


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a service of `log.report_to` is not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    for name in set(names).difference(map(str, get_available_trackers())):
        raise ConfigError(
            f"log.report_to: {name} is not installed; install the package (pip install {name}), or "
            f"remove {name} from log.report_to"
        )


class Trackers:
    """The services of `log.report_to`, which show `config` beside the curves; for one rank.

    WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names the project.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self._names, self._folder, self._config = [*names], folder, config
        self._running: dict[str, Any] = {}

    def begin(self, stage: str, step: int) -> None:
        """Start the runs of a stage, or continue them if `step` steps were logged before."""
        self.close()
        path = self._folder / _RUN_IDS
        ids: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        of_stage = ids.get(stage) if step else None
        ids[stage] = of_stage or {"id": uuid.uuid4().hex}
        for name in [*self._names]:
            with self._dropped_on_failure(name):
                self._running[name] = self._started(name, stage, step, ids[stage])
        if self._names not in ([], ["tensorboard"]):
            files.write_json(path, ids)

    def _started(self, name: str, stage: str, step: int, ids: dict[str, str]) -> Any:
        from accelerate import tracking

        run_name, out = f"{self._folder.name}/{stage}", str(self._folder)
        project = os.environ.get("WANDB_PROJECT", "megakd")
        options: dict[str, Any] = {}
        if name == "tensorboard":
            # Steps after a checkpoint are logged again. A full disk is met by `log`, which flushes,
            # and not by the writer's own thread.
            options = {"purge_step": step + 1 if step else 0, "flush_secs": 10**9}
            project, options["logging_dir"] = stage, f"{out}/tensorboard"
        elif name == "wandb":
            options = {"id": ids["id"], "resume": "allow", "name": run_name, "dir": out}
            options["group"] = self._folder.name
        elif name == "swanlab":
            options = {"id": ids["id"], "resume": "allow", "experiment_name": run_name}
        elif name == "trackio":
            options = {"name": f"{run_name}-{ids['id'][:6]}", "resume": "allow"}
        elif name == "mlflow":
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", "megakd")
            options = {"run_name": run_name, "run_id": ids.get(name)}
        tracker = tracking.LOGGER_TYPE_TO_CLASS[name](project, **options)
        # Both ask accelerate's own state for the rank, which would set threads and devices anew.
        tracker.main_process_only = False
        tracking.logger = cast("Any", logging.getLogger(tracking.__name__))
        tracker.start()
        if step == 0 and name != "tensorboard":
            tracker.store_init_configuration({k: str(v) for k, v in self._config.items()})
        if name == "mlflow":
            ids[name] = tracker.active_run.info.run_id
        return tracker

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of an optimiser step of the stage that has begun."""
        named = {re.sub(r"[^\w. /-]", "_", key): value for key, value in values.items()}
        for name, tracker in [*self._running.items()]:
            with self._dropped_on_failure(name):
                tracker.log(named, step=step)

    def close(self) -> None:
        """Close all runs."""
        for name in [*self._running]:
            with self._dropped_on_failure(name):
                self._running.pop(name).finish()

    @contextmanager
    def _dropped_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a service may raise anything
            self._names.remove(name)
            self._running.pop(name, None)
            logger.warning(
                "log.report_to: %s failed (%s): no further values of this run are sent there; "
                "metrics.jsonl has all values",
                *(name, one_line(error)),
            )


LOSS = "train/loss"

LEARNING_RATE = "train/learning_rate"

TOKENS_PER_SECOND = "train/tokens_per_s"

MEMORY_BYTES = "train/memory_bytes"

SHOWN = {
    LOSS: "loss",
    LEARNING_RATE: "lr",
    TOKENS_PER_SECOND: "tok/s",
    MEMORY_BYTES: "mem",
    "train/skipped_steps": "skipped",
    TOKENS_PER_TEXT: "tok/text",
    TRUNCATED: "truncated",
}


class Reporter:
    """Writer of scalars to metrics.jsonl, trackers and terminal; only the main rank writes.

    A terminal gets a progress bar, another standard error log lines.
    """

    def __init__(
        self, output_dir: Path, *, is_main: bool, trackers: Trackers | None = None
    ) -> None:
        self._path = output_dir / "metrics.jsonl"
        self._is_main, self._trackers = is_main, trackers or Trackers((), output_dir, {})
        self._stage, self._first, self._last = "", 0, 0
        self._steps_per_epoch = 1
        self._bar: tqdm | None = None
        self._began = time.perf_counter()

    def check(self) -> None:
        """Raise MegakdError if metrics.jsonl cannot be written, before any long work."""
        with _reports_unusable(self._path):
            if self._is_main and self._path.exists():
                self._path.open("ab").close()

    def begin(self, stage: str, step: int, *, last: int, steps_per_epoch: int) -> None:
        """Remove the entries for `stage` after the `step` steps of `last` that are done.

        These are repeated.
        """
        if not self._is_main:
            return
        with _reports_unusable(self._path):
            if self._path.exists():
                with self._path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                    lines = list(file)
                kept = [line for line in lines if _stays(line, stage, step)]
                if len(kept) < len(lines):
                    files.write_text(self._path, "".join(kept))
        self._trackers.begin(stage, step)
        self._stage, self._first, self._last = stage, step, last
        self._steps_per_epoch = steps_per_epoch
        self._began = time.perf_counter()
        if self._bar is not None:
            self._bar.close()
        if sys.stderr.isatty():
            from tqdm import tqdm

            options = {"desc": stage, "unit": "step", "dynamic_ncols": True}
            self._bar = tqdm(total=last, initial=step, **options)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers of a step of the stage that has begun."""
        if not self._is_main:
            return
        values = {key: float(value) for key, value in scalars.items()}
        epoch = round(step / self._steps_per_epoch, 4)
        record = {"stage": self._stage, "step": step, "epoch": epoch}
        record |= {"time": round(time.time(), 3), **values}
        line = files.json_text(record).encode() + b"\n"
        with _reports_unusable(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: the rest of a buffer would fail again when the file is closed.
            with self._path.open("ab", buffering=0) as file:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._trackers.log(step, values)
        shown = _shown(values)
        if self._bar is not None:
            self.advance(step)
            if shown:
                self._bar.set_postfix_str(", ".join(part.replace(" ", "=", 1) for part in shown))
        else:
            if LOSS in values:
                done, left = max(1, step - self._first), self._last - step
                minutes, rest = divmod(round((time.perf_counter() - self._began) / done * left), 60)
                shown.insert(-1, f"ETA {minutes // 60}:{minutes % 60:02d}:{rest:02d}")
            head = f"{self._stage} {step}/{self._last}", f"epoch {epoch:.2f}"
            logger.info("%s", "  ".join([*head, *shown]))

    def close(self) -> None:
        """Close the bar and the trackers."""
        if self._bar is not None:
            self._bar.close()
        self._trackers.close()


def _shown(scalars: Mapping[str, float]) -> list[str]:
    # metrics.jsonl has all numbers, also those of views.
    forms = {MEMORY_BYTES: "{:.1f}GB", TOKENS_PER_SECOND: "{:,.0f}"}
    texts = {
        name: forms.get(key, "{:.4g}").format(scalars[key] / (1e9 if key == MEMORY_BYTES else 1))
        for key, name in SHOWN.items()
        if key in scalars
    }
    texts |= {
        key: f"{value:.4g}"
        for key, value in scalars.items()
        if key.startswith("eval/") and key.count("/") == 1
    }
    return [f"{name} {text}" for name, text in texts.items()]


@contextmanager
def _reports_unusable(path: Path) -> Iterator[None]:
    try:
        with files.reports_full_disk(path):
            yield
    except OSError as error:
        raise MegakdError(
            f"{path} cannot be used ({error.strerror or error}), and the run writes its metrics "
            "there; move the file or folder away, then start the same command again"
        ) from error


def _stays(line: str, stage: str, step: int) -> bool:
    if not line.endswith("\n"):
        return False  # cut by a kill or a full disk
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False  # a damaged line is of no use
    # A stage that starts over repeats everything, also its evaluation at step 0.
    return record.get("stage") != stage or (record.get("step", 0) <= step and step > 0)


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

    def of(self, plan: Sequence[Pass], counts: Mapping[Unit, int]) -> tuple[float, float]:
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
