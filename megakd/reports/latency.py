"""Times of models that do the same work by turns, so that noise affects all of them alike."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from megakd.engine.memory import device_name
from megakd.models.forwards import Graph, Timed, by_turns, calls_of, sample_lengths
from megakd.models.loading import load_finished

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)
Rounds = dict[int, dict[str, list[float]]]
"""Milliseconds of a forward by batch, model and round; the n-th of all models are of one round."""


def measure_latencies(
    models: Mapping[str, PreTrainedModel | Path],
    lengths: Sequence[int],
    batches: Sequence[int],
    graphs: Mapping[str, Path] = MappingProxyType({}),
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Rounds:
    """Time one forward of each model by turns at each batch, the number of texts at a time.

    The texts are as long as those of the data, whose `lengths` are in tokens; a batch is padded to
    its longest text. A causal LM computes the logits of the last position, as it does before it
    generates. All models are in memory at once; those in a Hugging Face folder are loaded, by
    default on the CPU and in their stored dtype. `graphs` are timed beside the models of the same
    names, as NAME_onnx.
    """
    with ExitStack() as stack:
        loaded = {
            name: stack.enter_context(_evaluated(model, device, dtype))
            for name, model in models.items()
        }
        graphed = {f"{name}_onnx": Graph(path, loaded[name]) for name, path in graphs.items()}
        ready: dict[str, Timed] = {**loaded, **graphed}
        rounds: Rounds = {}
        for batch in batches:
            logger.info("timing %s: batches of %d", ", ".join(ready), batch)
            texts = sample_lengths(lengths, batch)
            calls = [calls_of(model, texts) for model in ready.values()]
            times = [[ms / len(texts) for ms in one] for one in by_turns(calls)]
            rounds[batch] = {
                name: list(of_model) for name, *of_model in zip(ready, *times, strict=True)
            }
    return rounds


def latency_report(
    rounds: Rounds,
    reference: str | None,
    lengths: Sequence[int],
    *,
    device: torch.device,
    dtype: str,
) -> dict[str, Any]:
    """Return the report's entries on latency: medians, and speed-ups to the model `reference`.

    A speed-up is the median of the ratios of the rounds, with its range: of eight or more rounds
    without the lowest and the highest.
    """
    count = torch.get_num_threads()
    threads = f" ({count} thread{'' if count == 1 else 's'})" if device.type == "cpu" else ""
    entries: dict[str, Any] = {
        "batches": [*rounds],
        "latency.tokens": round(statistics.fmean(lengths)),
        "latency.device": device_name(device) + threads,
        "latency.dtype": dtype,
    }
    for batch, times in rounds.items():
        for name, of_model in times.items():
            entries[f"{name}.ms_batch_{batch}"] = statistics.median(of_model)
            entries[f"latency.rounds_batch_{batch}"] = len(of_model)
            onnx = f"{reference}_onnx" if name.endswith("_onnx") else reference
            theirs = times.get(onnx or "", times.get(reference or ""))
            if theirs is not None:
                ratios = sorted(a / b for a, b in zip(theirs, of_model, strict=True))
                outside = 1 if len(ratios) >= 8 else 0
                key = f"{name}.speedup_batch_{batch}"
                entries[key] = statistics.median(ratios)
                entries |= {f"{key}_low": ratios[outside], f"{key}_high": ratios[-1 - outside]}
    return entries


@contextmanager
def _evaluated(
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
