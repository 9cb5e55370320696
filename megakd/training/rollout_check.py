"""The check that prompts and generated texts fit, before any weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.data.rollout_rows import Prompts
from megakd.errors import ConfigError
from megakd.models.generation import context_length

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.data.encoding import Encoded
    from megakd.models.source import ModelSource


def check_generated_texts(config: RunConfig, encoded: Encoded, student: ModelSource) -> None:
    """Check that all prompts and texts of `rollout` and of `eval.generation` fit.

    Raises:
        DataError: the rows have no prompts.
        ConfigError: the longest prompt and text are longer than `task.max_length`, or than the
            context of the student.
    """
    rollouts, generation = config.rollout, config.eval.generation
    if rollouts is not None and encoded.stream is None:
        prompts = Prompts(encoded.train, prompt_tokens=rollouts.prompt_tokens)
        _check(prompts, rollouts.longest, config, student, key="rollout")
    if generation is not None:
        rows = encoded.validation.select(range(min(generation.rows, len(encoded.validation))))
        key = "eval.generation"
        prompts = Prompts(rows, prompt_tokens=generation.prompt_tokens, key=key)
        _check(prompts, generation.max_new_tokens, config, student, key=key)


def _check(
    prompts: Prompts, longest: int, config: RunConfig, student: ModelSource, *, key: str
) -> None:
    """Check the longest prompt with a completion of `longest` tokens; `key` names the section."""
    length, row = prompts.longest()
    together, room = length + longest, config.task.max_length
    lengths = (
        f"{key}.max_new_tokens: {longest} and the longest prompt of {length} tokens (row "
        f"{row + 1}) are {together} tokens"
    )
    if together > room:
        raise ConfigError(
            f"{lengths}, and task.max_length is {room}; set task.max_length to {together}, lower "
            f"{key}.max_new_tokens to {max(room - length, 1)}, or remove long prompts"
        )
    context = context_length(student.config)
    if context is not None and together > context:
        raise ConfigError(
            f"{lengths}, and {student.where} has a context of {context}; lower "
            f"{key}.max_new_tokens, or remove long prompts"
        )
