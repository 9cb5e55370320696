"""Steps, warm-up and learning rate of a stage, from the settings in `train`."""

from __future__ import annotations

import math

from megakd.config.schedules import SCHEDULES, Schedule
from megakd.config.train import TrainConfig
from megakd.errors import ConfigError


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Return the optimizer steps of a stage; `max_steps` overrides `num_train_epochs`."""
    return train.max_steps or math.ceil(train.num_train_epochs * steps_per_epoch)


def warmup_steps(train: TrainConfig, total_steps: int) -> int:
    """Return the optimizer steps of warm-up; `warmup_steps` overrides `warmup_ratio`."""
    return train.warmup_steps or math.ceil(train.warmup_ratio * total_steps)


def schedule_problem(train: TrainConfig, total_steps: int | None) -> str | None:
    """Return why a schedule cannot work in a stage, or None.

    Args:
        train: settings whose options already have the right types.
        total_steps: optimizer steps of the stage; None before the data are read.
    """
    options = SCHEDULES[train.lr_scheduler_type](**(train.lr_scheduler_kwargs or {}))
    # Before the data are read, a ratio only tells whether there is a warm-up.
    warm = warmup_steps(train, total_steps or 1)
    problem = options.problem(warm, total_steps, train.learning_rate)
    return f"{train.lr_scheduler_type}: {problem}" if problem else None


def learning_rate_schedule(train: TrainConfig, total_steps: int) -> Schedule:
    """Return the function from the number of steps taken to the learning rate.

    Args:
        train: settings with the peak rate, the schedule with its options, and the warm-up.
        total_steps: optimizer steps of the stage.

    Raises:
        ConfigError: the schedule's phases are longer than the stage.
    """
    problem = schedule_problem(train, total_steps)
    if problem:
        raise ConfigError(f"train.lr_scheduler_type: {problem}")
    options = SCHEDULES[train.lr_scheduler_type](**(train.lr_scheduler_kwargs or {}))
    warm, peak = warmup_steps(train, total_steps), train.learning_rate

    return lambda step: options.rate(step, warm, total_steps, peak)
