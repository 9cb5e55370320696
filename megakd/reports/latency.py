"""Times of models that do the same work, measured so that noise affects all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from megakd.contract.results import LatencyReport
from megakd.engine.memory import device_name
from megakd.models.forwards import (
    Call,
    Graph,
    Prepare,
    Timed,
    calls_of,
    forward,
    milliseconds,
    sample_lengths,
)
from megakd.models.loading import load_finished

WARM_UP = 3
LONG_MS = 100.0
"""A first time above this, of every model, counts: start-up costs are negligible."""
LEAST_ROUNDS, ENOUGH_MS, MOST_MS = 5, 500.0, 20_000.0
"""Timing ends after `ENOUGH_MS` over all models, before `LEAST_ROUNDS` only after `MOST_MS`."""


class Work(NamedTuple):
    """The work that is timed.

    batches: numbers of texts at a time, one measurement each.
    length: tokens per text, without padding; None: only texts of the data are timed.
    generate: number of the last tokens of a text that decoders also generate.
    rounds: most rounds, in each of which every model is timed once.
    of_data: tokens of the texts of the data; empty: only texts of one length are timed.
    """

    batches: Sequence[int]
    length: int | None
    generate: int = 0
    rounds: int = 9
    of_data: Sequence[int] = ()


def measure_latencies(
    models: Mapping[str, PreTrainedModel | Path],
    work: Work,
    graphs: Mapping[str, Path] = MappingProxyType({}),
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> list[LatencyReport]:
    """Time models by turns, so that other load on the machine slows all models alike.

    The order of the models rotates, because a forward depends on the caches that the previous
    forward filled. All models are in memory at once. A causal LM computes the logits of the last
    position, as it does before it generates. Models in a Hugging Face folder are loaded, by default
    on the CPU and in their stored dtype. The result has the forwards and then the generation of
    each batch, in the order of `models`; texts of the data come before those of one length.
    `graphs` are timed beside the models of the same names.
    """
    length = work.length or int(statistics.median(work.of_data))
    generated = min(work.generate, length - 1)
    with ExitStack() as stack:
        loaded = {n: stack.enter_context(_ready(m, device, dtype)) for n, m in models.items()}
        graphed = {f"{name} (onnx)": Graph(path, loaded[name]) for name, path in graphs.items()}
        ready: dict[str, Timed] = {**loaded, **graphed}
        decoders = {name: model for name, model in ready.items() if model.can_generate()}
        entries: list[LatencyReport] = []
        for batch in work.batches:
            if work.of_data:
                entries += _of_data(ready, work, batch)
            if work.length:
                entries += _timed(ready, [[length] * batch], work.rounds, length=length)
            if generated:
                entries += _generated(decoders, work, [length] * batch, generated)
    return entries


def _of_data(models: Mapping[str, Timed], work: Work, batch: int) -> Iterator[LatencyReport]:
    batches = sample_lengths(work.of_data, batch)
    mean = round(statistics.fmean(work.of_data))
    for entry in _timed(models, batches, work.rounds, length=mean):
        yield {**entry, "lengths": [length for texts in batches for length in texts]}


def _generated(
    models: Mapping[str, Timed], work: Work, texts: Sequence[int], count: int
) -> Iterator[LatencyReport]:
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}

    def prepare(model: Any, inputs: dict[str, Any]) -> Call:
        return partial(model.generate, **inputs, **options, pad_token_id=0)

    prompts = [length - count for length in texts]
    for entry in _timed(models, [prompts], work.rounds, length=texts[0], prepare=prepare):
        rate = 1e3 * len(texts) * count / entry["ms"]
        yield {**entry, "generated": count, "tokens_per_second": rate}


def _timed(
    models: Mapping[str, Timed],
    batches: Sequence[Sequence[int]],
    most: int,
    *,
    length: int,
    prepare: Prepare = forward,
) -> Iterator[LatencyReport]:
    # A time is the mean over the batches, in at most `most` rounds.
    times = _rounds([calls_of(m, batches, prepare) for m in models.values()], most)
    count = torch.get_num_threads()
    threads = f" ({count} thread{'' if count == 1 else 's'})"
    for (name, model), *rounds in zip(models.items(), *times, strict=True):
        each, device = [ms / len(batches) for ms in rounds], next(model.parameters()).device
        entry = LatencyReport(
            model=name,
            batch=len(batches[0]),
            ms=statistics.median(each),
            length=length,
            device=device_name(device) + (threads if device.type == "cpu" else ""),
            dtype=str(model.dtype).removeprefix("torch."),
            rounds_ms=each,
        )
        if isinstance(model, Graph):
            entry.update({"model": name.removesuffix(" (onnx)"), "runtime": "onnxruntime"})
        yield entry


def _rounds(calls: Sequence[Call], most: int) -> list[list[float]]:
    if not calls:
        return []
    first = [_warm_up(call) for call in calls]
    rounds = [first] if min(first) > LONG_MS else []
    while len(rounds) < most:
        limit = MOST_MS if len(rounds) < LEAST_ROUNDS else ENOUGH_MS
        if len(rounds) > 1 and sum(map(sum, rounds)) > limit:
            break
        times = [0.0] * len(calls)
        for turn in range(len(calls)):
            index = (turn + len(rounds)) % len(calls)
            times[index] = milliseconds(calls[index])
        rounds.append(times)
    return rounds


def _warm_up(call: Call) -> float:
    # The time of a long first call, or of the last of a few calls.
    ms = milliseconds(call)
    for _ in range(WARM_UP - 1):
        if ms > LONG_MS:
            break
        ms = milliseconds(call)
    return ms


@contextmanager
def _ready(
    model: PreTrainedModel | Path, device: torch.device | None, dtype: torch.dtype | None
) -> Iterator[PreTrainedModel]:
    is_folder = isinstance(model, Path)
    loaded = load_finished(model, "latency", device=device, dtype=dtype) if is_folder else model
    was_training = loaded.training
    loaded.eval()
    try:
        yield loaded
    finally:
        loaded.train(was_training)
