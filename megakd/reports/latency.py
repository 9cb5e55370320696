"""Times of models that do the same work by turns, so that noise affects all of them alike."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megakd.engine.memory import device_name
from megakd.models.forwards import Timed, by_turns, calls_of, sample_lengths

logger = logging.getLogger(__name__)
Rounds = dict[int, dict[str, list[float]]]
"""Milliseconds of a forward by batch, model and round; the n-th of all models are of one round."""


def measure_latencies(
    models: Mapping[str, Timed], lengths: Sequence[int], batches: Sequence[int]
) -> Rounds:
    """Time one forward of each model by turns at each batch, the number of texts at a time.

    The texts are as long as those of the data, whose `lengths` are in tokens; a batch is padded to
    its longest text. A causal LM computes the logits of the last position, as it does before it
    generates. The models are left in evaluation mode.
    """
    rounds: Rounds = {}
    for batch in batches:
        logger.info("timing %s: batches of %d", ", ".join(models), batch)
        texts = sample_lengths(lengths, batch)
        calls = [calls_of(model.eval(), texts) for model in models.values()]
        times = [[ms / len(texts) for ms in one] for one in by_turns(calls)]
        rounds[batch] = {
            name: list(of_model) for name, *of_model in zip(models, *times, strict=True)
        }
    return rounds


def latency_report(
    rounds: Rounds, reference: str, lengths: Sequence[int], *, device: torch.device, dtype: str
) -> dict[str, Any]:
    """Return the report's entries on latency: medians, and speed-ups to the model `reference`.

    A speed-up is the median of the ratios of the rounds, with its range: of eight or more rounds
    without the lowest and the highest.
    """
    threads = " (CPU time of one thread)" if device.type == "cpu" else ""
    entries: dict[str, Any] = {
        "batches": [*rounds],
        "latency.tokens": round(statistics.fmean(lengths)),
        "latency.device": device_name(device) + threads,
        "latency.dtype": dtype,
    }
    for batch, times in rounds.items():
        entries[f"latency.rounds_batch_{batch}"] = len(times[reference])
        for name, of_model in times.items():
            ratios = sorted(a / b for a, b in zip(times[reference], of_model, strict=True))
            outside = 1 if len(ratios) >= 8 else 0
            key = f"{name}.speedup_batch_{batch}"
            entries |= {
                f"{name}.ms_batch_{batch}": statistics.median(of_model),
                key: statistics.median(ratios),
                f"{key}_low": ratios[outside],
                f"{key}_high": ratios[-1 - outside],
            }
    return entries
