"""The time of a model and of its ONNX graph for batches of texts.

On a CPU a time is the CPU time of one thread. The time on the clock is also that of other processes
of the machine, and that of several threads depends on how many cores these leave.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megakd.config.task import TaskType
from megakd.models.onnx import OnnxModel
from megakd.models.small_copy import one_thread

TEXTS = 8
"""Least number of texts of the data that are timed."""

LAST_POSITIONS = "logits_to_keep"

WARM_UP = 2

LEAST_ROUNDS, MOST_ROUNDS, ENOUGH_MS, MOST_MS = 5, 9, 500.0, 20_000.0
"""Timing ends after `ENOUGH_MS` over all models, before `LEAST_ROUNDS` only after `MOST_MS`."""


class Graph(nn.Module):
    """The graph of a model, which answers on one thread of the CPU."""

    dtype = torch.float32

    def __init__(self, path: Path, model: PreTrainedModel) -> None:
        super().__init__()
        self.config, self._graph = model.config, OnnxModel(path, threads=1)
        self.place = nn.Parameter(torch.zeros(1))

    def forward(self, **inputs: Tensor) -> object:
        zeros = torch.zeros_like(inputs["input_ids"])  # for the types of tokens
        return self._graph.logits({n: inputs.get(n, zeros) for n in self._graph.inputs})


Timed = PreTrainedModel | Graph

Call = Callable[[], object]


def sample_lengths(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Return batches whose texts are as long as those of the data, and as different."""
    ordered = sorted(lengths)
    several = ordered[0] < ordered[-1]
    count = -(-TEXTS // batch) if several else 1
    texts = range(count * batch)
    drawn = [ordered[(2 * n + 1) * len(ordered) // (2 * len(texts))] for n in texts]
    return [drawn[number::count] for number in range(count)]


def calls_of(model: Timed, batches: Sequence[Sequence[int]]) -> Call:
    """Return a function that makes a call for each batch of texts of these lengths.

    A batch is padded to its longest text. The tokens are random, and the same every time. A causal
    LM computes the last position, as before it generates.
    """
    last = {LAST_POSITIONS: 1} if LAST_POSITIONS in signature(model.forward).parameters else {}
    calls = [partial(model, **_inputs(model, texts), **last) for texts in batches]
    return lambda: [call() for call in calls]


def milliseconds(call: Call) -> float:
    """Return the time of a call without gradients, on a GPU until its work is done."""
    is_cuda = _is_cuda()
    finish = torch.cuda.synchronize if is_cuda else lambda: None
    clock = time.perf_counter if is_cuda else time.thread_time
    finish()
    start = clock()
    with torch.inference_mode():
        call()
    finish()
    return (clock() - start) * 1e3


def _is_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def by_turns(calls: Sequence[Call]) -> list[list[float]]:
    """Return the milliseconds of each call in each round, in which the calls take turns.

    Noise affects all calls of a round alike. The order rotates, because a forward depends on the
    caches that the previous one filled.
    """
    rounds: list[list[float]] = []
    with nullcontext() if _is_cuda() else one_thread():
        while len(rounds) < WARM_UP + MOST_ROUNDS:
            times = [0.0] * len(calls)
            for turn in range(len(calls)):
                index = (turn + len(rounds)) % len(calls)
                times[index] = milliseconds(calls[index])
            rounds.append(times)
            timed, spent = len(rounds) - WARM_UP, sum(map(sum, rounds))
            if timed > 0 and spent > (MOST_MS if timed < LEAST_ROUNDS else ENOUGH_MS):
                break
    return rounds[WARM_UP:]


def batches_of(task: TaskType) -> tuple[int, ...]:
    """Return the numbers of texts at a time that are timed."""
    return (1,) if task == "causal_lm" else (1, 32)


def _inputs(model: Timed, texts: Sequence[int]) -> dict[str, Any]:
    # A separate generator leaves the run's random state alone.
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    lengths = torch.tensor(texts)[:, None]
    ids = torch.randint(vocabulary, (len(texts), max(texts)), generator=generator)  # [B, T]
    mask = (torch.arange(ids.shape[1]) < lengths).to(ids.dtype)
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
