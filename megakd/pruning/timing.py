"""Times of cuts of a model, from random weights, before anything is trained."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from megakd.contract.views import View
from megakd.errors import ConfigError
from megakd.models.architectures import context_length
from megakd.models.cutting import cut_config
from megakd.models.fitting import build_empty
from megakd.models.forwards import Call, Graph, Timed, calls_of, milliseconds, sample_lengths
from megakd.models.onnx import MODEL, check_packages, write_bare_graph

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

    from megakd.config.task import TaskConfig
    from megakd.contract.lab import TimedWork
    from megakd.models.source import ModelSource

LEAST_ROUNDS, MOST_SECONDS, SURE = 15, 20.0, 0.01
"""A comparison ends when the standard error of the ratio is 1 %, or after 20 seconds."""
INTERRUPTED = 0.2
"""Seconds a second that threads wait for a core: 0.06 on an idle machine, 1 beside a training."""
THREADS = Path("/proc/self/task")
logger = logging.getLogger(__name__)


class Stopwatch:
    """Forwards of cut models, timed by turns with forwards of the whole model.

    lengths: numbers of tokens of the held-out rows.

    Raises:
        ConfigError: this machine has no such device, or no such runtime.
    """

    def __init__(
        self, source: ModelSource, task: TaskConfig, work: TimedWork, lengths: Sequence[int]
    ) -> None:
        if work.runtime == "onnx":
            check_packages("method.timing.runtime: onnx")
        if work.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "method.timing.device: cuda, and this process sees no GPU; time on a machine with "
                "one, or set method.timing.device to cpu"
            )
        longest = context_length(source.config)
        if longest is not None and work.tokens != "data" and work.tokens > longest:
            raise ConfigError(
                f"method.timing.tokens: {work.tokens}, and the model takes at most {longest} "
                "tokens; lower method.timing.tokens"
            )
        self._source, self._task, self._work = source, task, work
        if work.tokens == "data":
            self._batches = sample_lengths(lengths, work.batch)
        else:
            self._batches = [[work.tokens] * work.batch]

    def ratios(self, views: Mapping[str, View]) -> dict[str, float]:
        """Return the time of each view relative to the time of the whole model.

        A ratio is the median over rounds in which both models are timed: other load on the machine
        slows both, and the shortest times of two models are from different moments. Two models are
        in memory at a time.
        """
        times = {}
        with self._calls(self._source.config) as whole, told_if_interrupted():
            for name, view in views.items():
                times[name] = self._ratio(whole, view)
                logger.info("%s: %.1f times as fast as the whole model", name, 1 / times[name])
        return times

    def _ratio(self, whole: Call, view: View) -> float:
        with self._calls(cut_config(self._source.config, view)) as cut:
            for call in (cut, whole):
                milliseconds(call)
            ratios: list[float] = []
            began = time.perf_counter()
            while time.perf_counter() - began < MOST_SECONDS and not _is_sure(ratios):
                ratios.append(milliseconds(cut) / milliseconds(whole))
            return statistics.median(ratios)

    @contextmanager
    def _calls(self, config: PretrainedConfig) -> Iterator[Call]:
        device = torch.device(self._work.device)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = build_empty(self._source, self._task, config, dtype).eval()
        torch.nn.Module.to(model, device)  # transformers' own `to` is typed wrongly
        generator = torch.Generator(device).manual_seed(0)  # not the run's random state
        for parameter in model.parameters():
            parameter.data.uniform_(-0.05, 0.05, generator=generator)
        with TemporaryDirectory() as folder:
            timed: Timed = model
            if self._work.runtime == "onnx":
                write_bare_graph(model, Path(folder) / MODEL)
                timed = Graph(Path(folder) / MODEL, model)
            yield calls_of(timed, self._batches)


@contextmanager
def told_if_interrupted() -> Iterator[None]:
    """Warn if other work used the processor: it slows small models more than large ones."""
    began, before = time.perf_counter(), _waited_s()
    yield
    share = (_waited_s() - before) / (time.perf_counter() - began)
    if share > INTERRUPTED:
        logger.warning(
            "other work kept the timing waiting for a core %.1f of every second, and the speed-up "
            "may be off by a fifth: end it, remove stages/times* of the run, and start again",
            share,
        )


def _waited_s() -> float:
    """Return how long the threads of this process have waited for a core; 0 if not on Linux."""
    total_ns = 0
    for path in THREADS.glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended
            total_ns += int(path.read_text("ascii").split()[1])
    return total_ns / 1e9


def _is_sure(ratios: Sequence[float]) -> bool:
    if len(ratios) < LEAST_ROUNDS:
        return False
    lower, middle, upper = statistics.quantiles(ratios, n=4)
    # The standard error of the median of normal values, by the distance of their quartiles.
    return 0.93 * (upper - lower) / math.sqrt(len(ratios)) <= SURE * middle
