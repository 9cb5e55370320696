"""The largest step of a rank: how often its engines and its teachers run, on how many tokens."""

from __future__ import annotations

from typing import NamedTuple

from megakd.config.deepspeed import load_ds_config, zero_stage
from megakd.config.run import RunConfig
from megakd.config.task import TaskConfig
from megakd.config.train import TrainConfig
from megakd.contract.tasks import Dtype
from megakd.data.step_layout import StepLayout, StepShape
from megakd.models.knowledge import Needs
from megakd.models.source import ReadyTeacher
from megakd.training.precision import TORCH_DTYPE

BUDGET = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Bytes for the answers of a step and the activations of the forward that computes them."""
_IN_FLIGHT = 12
"""Tensors as wide as the hidden states that a forward without gradient holds at a time."""


class StepSize(NamedTuple):
    """The largest step of a rank: micro-batches, rows of each, and positions per row."""

    micro_batches: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def largest_step(train: TrainConfig, task: TaskConfig) -> StepSize:
    """Return the sizes of a step in which every row has `task.max_length` tokens."""
    shape = StepShape(train.per_device_train_batch_size, train.gradient_accumulation_steps)
    layout = StepLayout(shape, train.tokens_per_rank)
    count = layout.most_micro_batches(task.row_length)
    if train.tokens_per_rank is None:
        return StepSize(count, shape.per_device, task.row_length)
    return StepSize(count, 1, train.tokens_per_rank)


def joins_micro_batches(
    ready: ReadyTeacher,
    needs: Needs,
    train: TrainConfig,
    config: RunConfig,
    *,
    dtype: Dtype,
    device: str,
) -> bool:
    """Return whether one forward of a teacher answers all micro-batches of a step.

    By default a replicated teacher answers them one by one. A teacher at ZeRO 3 is gathered in
    every forward, so it answers them together if that fits into `BUDGET`.
    """
    step = largest_step(train, config.task)
    if step.micro_batches == 1 or ready.spec.joins_micro_batches is not None:
        return step.micro_batches > 1 and bool(ready.spec.joins_micro_batches)
    if zero_stage(load_ds_config(ready.spec.deepspeed, where="teacher.deepspeed")) != 3:
        return False
    source = ready.source
    kept = 1 + len(needs.hidden_layers) + 3 * len(needs.attention_layers)
    width = source.architecture.hidden_width(source.config) * TORCH_DTYPE[dtype].itemsize
    return step.micro_batches * step.tokens * width * (kept + _IN_FLIGHT) <= BUDGET[device]
