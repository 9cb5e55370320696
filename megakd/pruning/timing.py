"""Times of cuts of a model, from random weights, before anything is trained."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megakd.contract.views import View
from megakd.models.cutting import cut_config
from megakd.models.fitting import build_empty

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

    from megakd.config.task import TaskConfig
    from megakd.contract.lab import TimedWork
    from megakd.models.source import ModelSource

LEAST_ROUNDS, MOST_SECONDS, CLOSE = 5, 20.0, 1.03
"""A comparison ends when the two shortest times of both models are this close, or too late."""
TEXTS = 8
"""Texts of a round, whose lengths are those of the data; a batch may have more."""
logger = logging.getLogger(__name__)
Batch = dict[str, Tensor]
Run = Callable[[Batch], object]


class Stopwatch:
    """Forwards of cut models, timed by turns with forwards of the whole model.

    lengths: numbers of tokens of the held-out rows, sorted.
    """

    def __init__(
        self, source: ModelSource, task: TaskConfig, work: TimedWork, lengths: Sequence[int]
    ) -> None:
        self._source, self._task, self._work = source, task, work
        self._batches = [self._batch(part) for part in _parts(lengths, work)]

    def ratios(self, views: Mapping[str, View]) -> dict[str, float]:
        """Return the time of each view relative to the time of the whole model.

        The shortest time of a model over the rounds counts, which other load on the machine changes
        least. Two models are in memory at a time.
        """
        with self._runner(self._source.config) as whole:
            found = {}
            for name, view in views.items():
                found[name] = self._ratio(whole, view)
                logger.info("%s: %.1f times as fast as the whole model", name, 1 / found[name])
            return found

    def _ratio(self, whole: Run, view: View) -> float:
        with self._runner(cut_config(self._source.config, view)) as cut:
            runs, times = (cut, whole), ([], [])
            for run in runs:
                self._seconds(run)
            began = time.perf_counter()
            while time.perf_counter() - began < MOST_SECONDS and not all(map(_is_sure, times)):
                for run, of_run in zip(runs, times, strict=True):
                    of_run.append(self._seconds(run))
            return min(times[0]) / min(times[1])

    def _seconds(self, run: Run) -> float:
        is_cuda = self._device.type == "cuda"
        finish = torch.cuda.synchronize if is_cuda else lambda: None
        finish()
        start = time.perf_counter()
        for batch in self._batches:
            run(batch)
        finish()
        return time.perf_counter() - start

    @contextmanager
    def _runner(self, config: PretrainedConfig) -> Iterator[Run]:
        model = build_empty(self._source, self._task, config, self._dtype).eval()
        torch.nn.Module.to(model, self._device)  # transformers' own `to` is typed wrongly
        generator = torch.Generator(self._device).manual_seed(0)  # not the run's random state
        for parameter in model.parameters():
            parameter.data.uniform_(-0.05, 0.05, generator=generator)
        with torch.inference_mode(), TemporaryDirectory() as folder:
            if self._work.runtime == "torch":
                yield lambda batch: model(**batch)
            else:
                from megakd.models.onnx import graph_of

                yield graph_of(model, Path(folder)).logits

    @property
    def _device(self) -> torch.device:
        return torch.device(self._work.device)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self._work.device == "cpu" else torch.bfloat16

    def _batch(self, lengths: Sequence[int]) -> Batch:
        ids = torch.arange(max(lengths)) % self._source.config.vocab_size
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [B, T]
        rows = {"input_ids": ids.expand_as(mask).clone(), "attention_mask": mask.long()}
        return {name: tensor.to(self._device) for name, tensor in rows.items()}


def _is_sure(times: Sequence[float]) -> bool:
    if len(times) < LEAST_ROUNDS:
        return False
    first, second, *_ = sorted(times)
    return second <= CLOSE * first


def _parts(lengths: Sequence[int], work: TimedWork) -> list[list[int]]:
    """Return the lengths of the rows of each batch; rows of `data` are drawn evenly."""
    if work.tokens != "data":
        return [[work.tokens] * work.batch]
    batches = max(1, TEXTS // work.batch)
    count = batches * work.batch
    drawn = [lengths[(2 * index + 1) * len(lengths) // (2 * count)] for index in range(count)]
    return [drawn[first::batches] for first in range(batches)]
