"""How long a forward takes, measured so that two models meet the same noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from megakd.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from megakd.report import Speedup

WARM_UP_FORWARDS = 3


def compare_latency(
    teacher: PreTrainedModel | Path,
    student: PreTrainedModel | Path,
    *,
    batch: int,
    length: int,
    repeats: int = 20,
    device: torch.device | None = None,
) -> Speedup:
    """Times two models by turns, so that whatever else the machine does slows both.

    The turns also swap places, for the second of two forwards finds the caches of the first.

    Args:
        teacher: a loaded model, used where it is, or a Hugging Face folder.
        student: likewise.
        batch: texts per forward.
        length: tokens per text, all of them real.
        repeats: timed forwards of each, after a few untimed ones.
        device: where a folder's model is loaded; None means the CPU.

    Returns:
        The medians, as report.json has them.
    """
    times: tuple[list[float], list[float]] = ([], [])
    with (
        _timed(teacher, batch=batch, length=length, device=device) as first,
        _timed(student, batch=batch, length=length, device=device) as second,
    ):
        forwards = (first, second)
        for repeat in range(repeats):
            for index in (repeat % 2, 1 - repeat % 2):
                times[index].append(forwards[index]())
    teacher_ms, student_ms = (statistics.median(series) for series in times)
    return {"batch": batch, "teacher_ms": teacher_ms, "student_ms": student_ms}


@contextmanager
def _timed(
    model: PreTrainedModel | Path, *, batch: int, length: int, device: torch.device | None
) -> Iterator[Callable[[], float]]:
    """A warm forward that returns its milliseconds; the model is left in the mode it was in."""
    loaded = _load(model, device) if isinstance(model, Path) else model
    inputs = _inputs(loaded, batch, length)
    was_training = loaded.training
    loaded.eval()
    try:
        for _ in range(WARM_UP_FORWARDS):
            _milliseconds(loaded, inputs)
        yield lambda: _milliseconds(loaded, inputs)
    finally:
        loaded.train(was_training)


def _load(folder: Path, device: torch.device | None) -> PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [None])[0]
    if name is None or not hasattr(transformers, name):
        raise ModelError(
            f"{folder / 'config.json'} names the architecture {name!r}, which transformers "
            f"{transformers.__version__} does not have: its latency cannot be measured"
        )
    model = getattr(transformers, name).from_pretrained(folder, dtype="auto")
    return model.to(device or torch.device("cpu"))


def _inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    # Random words, the same every time; a private generator leaves the run's draws alone.
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, length), generator=generator)  # [B, T]
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def _milliseconds(model: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
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
