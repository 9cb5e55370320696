"""The rows whose prompts are continued, and the check that there are some, before any weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megakd.data.rollout_rows import Prompts
from megakd.errors import ConfigError
from megakd.models.generation import context_length

if TYPE_CHECKING:
    from datasets import Dataset

    from megakd.config.generation import GenerationConfig
    from megakd.config.rollout import RolloutConfig
    from megakd.config.run import RunConfig
    from megakd.data.encoding import Encoded
    from megakd.models.source import ModelSource

logger = logging.getLogger(__name__)


def check_generated_texts(config: RunConfig, encoded: Encoded, student: ModelSource) -> None:
    """Check and log which rows `rollout` and `eval.generation` use.

    Raises:
        DataError: the rows have no prompts.
        ConfigError: no prompt fits, or steps that use the data would have nothing to learn.
    """
    rollouts, generation = config.rollout, config.eval.generation
    if rollouts is not None and encoded.stream is None:
        prompts = prompts_of(encoded.train, rollouts, config, student)
        _say("rollout", prompts)
        _check_data(prompts, rollouts, config)
    if generation is not None:
        key = "eval.generation"
        _say(key, prompts_of(encoded.validation, generation, config, student, key=key))


def prompts_of(
    rows: Dataset,
    section: RolloutConfig | GenerationConfig,
    config: RunConfig,
    student: ModelSource,
    *,
    key: str = "rollout",
) -> Prompts:
    """Return the prompts of encoded rows, of which those that leave room for a text are continued.

    A prompt and the longest text fit in `task.max_length` and in the context of the student.

    Args:
        rows: the rows.
        section: the section of the config that asks for texts.
        config: the config of the run.
        student: the model of the student.
        key: name of the section.

    Raises:
        DataError: the rows have no prompts.
        ConfigError: no prompt leaves room for the longest text.
    """
    room, limit = config.task.max_length, "task.max_length"
    context = context_length(student.config)
    if context is not None and context < room:
        room, limit = context, f"the context of {student.where}"
    most, tokens = room - section.longest, section.prompt_tokens
    prompts = Prompts(rows, prompt_tokens=tokens, most=most, key=key)
    if not len(prompts.continued):
        shortest = min((n for n in prompts.lengths.tolist() if n), default=0)
        raise ConfigError(
            f"{key}.max_new_tokens: {section.longest} leaves {most} tokens of {limit} ({room}) for "
            f"the prompt, and the shortest of {len(rows)} rows has a prompt of {shortest} tokens; "
            f"set {key}.max_new_tokens to at most {max(room - shortest, 1)}, or raise {limit}"
        )
    return prompts


def _say(key: str, prompts: Prompts) -> None:
    rows, without = len(prompts.lengths), int((prompts.lengths == 0).sum())
    logger.log(
        logging.WARNING if len(prompts.continued) < rows else logging.INFO,
        "%s: %d of %d rows have a prompt that is continued; of the others, %d prompts are longer "
        "than %d tokens and leave no room for max_new_tokens, and %d rows have no prompt; %d rows "
        "have an answer to learn from",
        key,
        len(prompts.continued),
        rows,
        prompts.too_long,
        prompts.most,
        without,
        len(prompts.learned),
    )


def _check_data(prompts: Prompts, rollouts: RolloutConfig, config: RunConfig) -> None:
    """Check that steps that learn from the rows as they are have something to learn."""
    uses = {
        f"rollout.mix (data: {rollouts.mix.get('data', 0):g})": rollouts.mix.get("data"),
        f"rollout.from_step ({rollouts.from_step})": rollouts.from_step,
        f"method.name ({config.method.name})": config.method.cuts_student,
        "baselines": config.baselines,
        "finetune": any(spec.finetune for spec in config.teacher_specs.values()),
    }
    wanting = ", ".join(name for name, does in uses.items() if does)
    if wanting and not len(prompts.learned):
        raise ConfigError(
            f"{wanting}: learns from rows as they are, and all {len(prompts.lengths)} training "
            "rows are prompts without an answer; give the answers in a column completion "
            "(task.completion_column), or use generated texts alone: rollout.mix: {rollout: 1.0}, "
            "from_step: 0"
        )
