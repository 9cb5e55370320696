"""The check that prompts and generated texts fit, before any weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.data.rollout_rows import Prompts
from megakd.errors import ConfigError

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.data.encoding import Encoded
    from megakd.models.source import ModelSource


def check_rollouts(config: RunConfig, encoded: Encoded, student: ModelSource) -> None:
    """Check that all prompts and texts of a run fit; does nothing without `rollout`.

    Raises:
        DataError: the rows have no prompts.
        ConfigError: the longest prompt and text are longer than `task.max_length`.
    """
    rollouts = config.rollout
    if rollouts is None or encoded.stream is not None:
        return
    length, row = Prompts(encoded.train, prompt_tokens=rollouts.prompt_tokens).longest()
    together_tokens, room = length + rollouts.longest, config.task.max_length
    if together_tokens > room:
        raise ConfigError(
            f"rollout.max_new_tokens: {rollouts.longest} and the longest prompt of {length} tokens "
            f"(row {row + 1}) are {together_tokens} tokens, and task.max_length is {room}; set "
            f"task.max_length to {together_tokens}, lower rollout.max_new_tokens to "
            f"{max(room - length, 1)}, or remove long prompts"
        )
    context = getattr(student.config, "max_position_embeddings", None)
    if context is not None and together_tokens > context:
        raise ConfigError(
            f"rollout.max_new_tokens: {rollouts.longest} and the longest prompt of {length} tokens "
            f"(row {row + 1}) are {together_tokens} tokens, and {student.where} has a context of "
            f"{context}; lower rollout.max_new_tokens, or remove long prompts"
        )
