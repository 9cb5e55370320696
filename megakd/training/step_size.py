"""The largest step of a rank: how often its engines run, and on how many tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from megakd.data.step_layout import StepLayout, StepShape

if TYPE_CHECKING:
    from megakd.config.task import TaskConfig
    from megakd.config.train import TrainConfig


class StepSize(NamedTuple):
    """Sizes of the largest step of a rank.

    micro_batches: number of micro-batches.
    rows, length: rows of a micro-batch, and positions per row.
    """

    micro_batches: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Positions of a micro-batch."""
        return self.rows * self.length


def largest_step(train: TrainConfig, task: TaskConfig) -> StepSize:
    """Return the sizes of a step in which every row has `task.max_length` tokens.

    Args:
        train: settings of the stage.
        task: the task; only `max_length` is used.
    """
    shape = StepShape(train.per_device_train_batch_size, train.gradient_accumulation_steps)
    layout = StepLayout(shape, train.tokens_per_rank)
    count = layout.most_micro_batches(task.row_length)
    if train.tokens_per_rank is None:
        return StepSize(count, shape.per_device, task.row_length)
    return StepSize(count, 1, train.tokens_per_rank)
