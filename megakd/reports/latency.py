"""Times of models that do the same work, measured so that noise affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from megakd.contract.results import LatencyReport
from megakd.engine.memory import device_name
from megakd.models.own_models import load_finished

WARM_UP = 3
LONG_MS = 100.0
"""A first time above this, of every model, counts: start-up costs are negligible."""
LEAST_ROUNDS, ENOUGH_MS, MOST_MS = 5, 500.0, 20_000.0
"""Timing ends after `ENOUGH_MS` over all models, before `LEAST_ROUNDS` only after `MOST_MS`."""
LAST_POSITIONS = "logits_to_keep"


class Work(NamedTuple):
    """The work that is timed.

    batches: numbers of texts at a time, one measurement each.
    length: tokens per text, without padding.
    generate: number of the last tokens of a text that decoders also generate.
    rounds: most rounds, in each of which every model is timed once.
    """

    batches: Sequence[int]
    length: int
    generate: int = 0
    rounds: int = 9


def measure_latencies(
    models: Mapping[str, PreTrainedModel | Path],
    work: Work,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> list[LatencyReport]:
    """Time models by turns, so that other load on the machine slows all models alike.

    The order of the models rotates, because a forward depends on the caches that the previous
    forward filled. All models are in memory at once. A causal LM computes the logits of the last
    position, as it does before it generates. Models in a Hugging Face folder are loaded, by default
    on the CPU and in their stored dtype. The result has the forwards and then the generation of
    each batch, in the order of `models`.
    """
    generated = min(work.generate, work.length - 1)
    with ExitStack() as stack:
        ready = {n: stack.enter_context(_ready(m, device, dtype)) for n, m in models.items()}
        decoders = {name: model for name, model in ready.items() if model.can_generate()}
        entries: list[LatencyReport] = []
        for batch in work.batches:
            entries += _timed(ready, work, batch)
            entries += _timed(decoders, work, batch, generated) if generated else ()
    return entries


def _timed(
    models: Mapping[str, PreTrainedModel], work: Work, batch: int, generated: int = 0
) -> Iterator[LatencyReport]:
    inputs = [_inputs(model, batch, work.length - generated) for model in models.values()]
    prepare = partial(_generation, count=generated) if generated else _forward
    calls = [prepare(*pair) for pair in zip(models.values(), inputs, strict=True)]
    for (name, model), *rounds in zip(models.items(), *_rounds(calls, work.rounds), strict=True):
        entry = LatencyReport(
            model=name,
            batch=batch,
            ms=statistics.median(rounds),
            length=work.length,
            device=_place(model),
            dtype=str(model.dtype).removeprefix("torch."),
            rounds_ms=rounds,
        )
        if generated:
            entry["generated"] = generated
            entry["tokens_per_second"] = 1e3 * batch * generated / entry["ms"]
        yield entry


def _place(model: PreTrainedModel) -> str:
    device = next(model.parameters()).device
    threads = torch.get_num_threads()
    words = f" ({threads} thread{'' if threads == 1 else 's'})" if device.type == "cpu" else ""
    return device_name(device) + words


def _rounds(calls: Sequence[Callable[[], object]], most: int) -> list[list[float]]:
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
            times[index] = _milliseconds(calls[index])
        rounds.append(times)
    return rounds


def _warm_up(call: Callable[[], object]) -> float:
    # The time of a long first call, or of the last of a few calls.
    ms = _milliseconds(call)
    for _ in range(WARM_UP - 1):
        if ms > LONG_MS:
            break
        ms = _milliseconds(call)
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


def _inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Any]:
    # The same random tokens every time; a separate generator leaves the run's random state alone.
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, length), generator=generator)  # [B, T]
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def _forward(model: PreTrainedModel, inputs: dict[str, Any]) -> Callable[[], object]:
    last = {LAST_POSITIONS: 1} if LAST_POSITIONS in signature(model.forward).parameters else {}
    return partial(model, **inputs, **last)


def _generation(model: Any, inputs: dict[str, Any], *, count: int) -> Callable[[], object]:
    number = {"min_new_tokens": count, "max_new_tokens": count}
    return partial(model.generate, **inputs, **number, do_sample=False, pad_token_id=0)


def _milliseconds(call: Callable[[], object]) -> float:
    is_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    finish = torch.cuda.synchronize if is_cuda else lambda: None
    finish()
    start = time.perf_counter()
    with torch.inference_mode():
        call()
    finish()
    return (time.perf_counter() - start) * 1e3
