"""Latency of a forward, measured so that noise affects all models alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from megakd.contract.results import LatencyReport
from megakd.engine.device import device_name
from megakd.errors import ModelError
from megakd.models.own_models import own_class, register_own_models
from megakd.storage.finished_folder import check_given

if TYPE_CHECKING:
    from transformers import PreTrainedModel


WARM_UP_FORWARDS = 3
TIMED_BATCHES = (1, 32)
LAST_POSITIONS = "logits_to_keep"
LONG_FORWARD_MS = 100.0
"""A first forward that takes longer counts as a measurement: start-up costs are negligible."""
LEAST_REPEATS, ENOUGH_MS = 3, 500.0
"""Timing of a batch ends after `ENOUGH_MS` over all models, but not before `LEAST_REPEATS`."""


def measure_latencies(
    models: Mapping[str, PreTrainedModel | Path],
    *,
    batches: Sequence[int],
    length: int,
    repeats: int = 20,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> list[LatencyReport]:
    """Time models alternately, so that other load on the machine slows all models alike.

    The order of the models rotates, because a forward depends on the caches that the previous
    forward filled. All models are in memory at once. A causal LM computes the logits of the last
    position, as it does before it generates.

    Args:
        models: models by name; a loaded model stays on its device, a Hugging Face folder is loaded.
        batches: numbers of texts per forward, one measurement each.
        length: tokens per text, without padding.
        repeats: timed forwards of each model and batch, after a few warm-up forwards. Slow models
            are timed less often, see `ENOUGH_MS`.
        device: device for models that are loaded from a folder; None means the CPU.
        dtype: dtype for these models; None means the stored dtype.

    Returns:
        The medians, batch by batch, in the order of `models`.
    """
    with ExitStack() as stack:
        ready = [stack.enter_context(_ready(model, device, dtype)) for model in models.values()]
        return [
            LatencyReport(
                model=name,
                batch=batch,
                ms=median,
                length=length,
                device=_place(model),
                dtype=str(model.dtype).removeprefix("torch."),
            )
            for batch in batches
            for name, model, median in zip(
                models, ready, _medians(ready, batch, length, repeats), strict=True
            )
        ]


def _place(model: PreTrainedModel) -> str:
    """Return the name of the model's device, for a CPU with the number of threads."""
    device = next(model.parameters()).device
    threads = torch.get_num_threads()
    words = f" ({threads} thread{'' if threads == 1 else 's'})" if device.type == "cpu" else ""
    return device_name(device) + words


def _medians(
    models: Sequence[PreTrainedModel], batch: int, length: int, repeats: int
) -> list[float]:
    """Return the median milliseconds of each model's warm forward."""
    inputs = [_inputs(model, batch, length) for model in models]
    times = [_warm_up(model, given) for model, given in zip(models, inputs, strict=True)]
    for repeat in range(repeats):
        if min(map(len, times)) >= LEAST_REPEATS and sum(map(sum, times)) > ENOUGH_MS:
            break
        for turn in range(len(models)):
            index = (turn + repeat) % len(models)
            times[index].append(_milliseconds(models[index], inputs[index]))
    return [statistics.median(series) for series in times]


def _warm_up(model: PreTrainedModel, inputs: dict[str, Any]) -> list[float]:
    """Run warm-up forwards; return the milliseconds of a long first forward, or an empty list."""
    for _ in range(WARM_UP_FORWARDS):
        first = _milliseconds(model, inputs)
        if first > LONG_FORWARD_MS:
            return [first]
    return []


@contextmanager
def _ready(
    model: PreTrainedModel | Path, device: torch.device | None, dtype: torch.dtype | None
) -> Iterator[PreTrainedModel]:
    """Yield the model in evaluation mode, and restore its mode afterwards."""
    loaded = _load(model, device, dtype) if isinstance(model, Path) else model
    was_training = loaded.training
    loaded.eval()
    try:
        yield loaded
    finally:
        loaded.train(was_training)


def _load(folder: Path, device: torch.device | None, dtype: torch.dtype | None) -> PreTrainedModel:
    check_given(folder, "latency")
    register_own_models()
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["none"])[0]
    found: Any = own_class(name) or getattr(transformers, name, None)
    if found is None:
        raise ModelError(
            f"{folder / 'config.json'} names the architecture {name!r}, which transformers "
            f"{transformers.__version__} does not have: its latency cannot be measured"
        )
    model = found.from_pretrained(folder, dtype=dtype or "auto")
    return model.to(device or torch.device("cpu"))


def _inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Any]:
    # The same random tokens every time; a separate generator leaves the run's random state alone.
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, length), generator=generator)  # [B, T]
    device = next(model.parameters()).device
    last = {LAST_POSITIONS: 1} if LAST_POSITIONS in signature(model.forward).parameters else {}
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), **last}


def _milliseconds(model: PreTrainedModel, inputs: dict[str, Any]) -> float:
    device = inputs["input_ids"].device
    _finish(device)
    start = time.perf_counter()
    with torch.inference_mode():
        model(**inputs)
    _finish(device)
    return (time.perf_counter() - start) * 1e3


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
