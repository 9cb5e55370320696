"""Memory of generating texts: the cache of keys and values, and the logits of one position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from megakd.contract.tasks import STUDENT
from megakd.planning.engines import FP32

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from megakd.config.run import RunConfig
    from megakd.contract.stage import Stage

_LOGIT_BUFFERS = 4
"""Logits of one position, the logits of the sampling rules, the noise, and their sum."""


class Generation(NamedTuple):
    """Texts that a rank generates at the same time.

    when: the activity, for the plan.
    role: `student`, or the name of the teacher that generates.
    rows: number of texts.
    tokens: tokens of prompt and completion.
    """

    when: str
    role: str
    rows: int
    tokens: int

    def bytes(self, config: PretrainedConfig, itemsize: int) -> int:
        """Return the bytes in addition to the weights, for the model of a config."""
        cache = self.rows * self.tokens * cached_numbers(config) * itemsize
        return cache + self.rows * config.vocab_size * FP32 * _LOGIT_BUFFERS


def generations(stage: Stage, config: RunConfig) -> Iterator[Generation]:
    """Yield the kinds of texts that a stage generates, with their largest sizes."""
    longest = config.task.row_length
    rollouts, generation = stage.rollouts, config.eval.generation
    if rollouts is not None and rollouts.files is None and rollouts.server is None:
        train = stage.train
        rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
        rows = min(rows * (rollouts.max_staleness + 1), rollouts.rows_per_call)
        when = f"generating texts (rollout.rows_per_call {rollouts.rows_per_call})"
        yield Generation(when, rollouts.by, rows, longest)
    if generation is not None and stage.role == STUDENT:
        rows = min(generation.rows, generation.rows_per_call)
        when = f"evaluating on texts (eval.generation.rows_per_call {generation.rows_per_call})"
        yield Generation(when, STUDENT, rows, longest)


def cached_numbers(config: PretrainedConfig) -> int:
    """Return the keys and values of one token in all layers of a decoder."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * key_heads * width
