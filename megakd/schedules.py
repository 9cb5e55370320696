"""Learning rates as functions of the step: nothing to checkpoint, nothing to replay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megakd.config import TrainConfig

Schedule = Callable[[int], float]


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of a stage; `max_steps` wins over `num_train_epochs`."""
    return train.max_steps or math.ceil(train.num_train_epochs * steps_per_epoch)


def warmup_steps(train: TrainConfig, total_steps: int) -> int:
    """Optimiser steps of linear warm-up; `warmup_steps` wins over `warmup_ratio`."""
    return train.warmup_steps or math.ceil(train.warmup_ratio * total_steps)


def learning_rate_schedule(train: TrainConfig, total_steps: int) -> Schedule:
    """Step (from 0) -> learning rate, the shapes of Hugging Face's schedulers.

    Args:
        train: gives the peak rate, the shape and the warm-up.
        total_steps: optimiser steps of the stage; linear and cosine reach 0 there.

    Returns:
        A function of the number of steps already taken.
    """
    warm = warmup_steps(train, total_steps)
    decay = {"linear": _linear, "cosine": _cosine, "constant": _constant}[train.lr_scheduler_type]

    def rate(step: int) -> float:
        if step < warm:
            return train.learning_rate * step / warm
        return train.learning_rate * decay((step - warm) / max(1, total_steps - warm))

    return rate


def _linear(progress: float) -> float:
    return max(0.0, 1.0 - progress)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def _constant(progress: float) -> float:
    del progress
    return 1.0
