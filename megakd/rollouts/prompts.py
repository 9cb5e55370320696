"""The rows whose prompts are continued, and the check that there are some, before any weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megakd.errors import ConfigError
from megakd.models.architecture import context_length
from megakd.rollouts.text_rows import Prompts

if TYPE_CHECKING:
    from datasets import Dataset

    from megakd.config.rollout import GenerationConfig, RolloutConfig
    from megakd.config.run import RunConfig
    from megakd.data.encoding import Encoded
    from megakd.models.source import ModelSource

logger = logging.getLogger(__name__)


def check_generated_texts(config: RunConfig, encoded: Encoded, student: ModelSource) -> None:
    """Check and log which rows `rollout` and `eval.generation` use."""
    rollouts, generation = config.rollout, config.eval.generation
    if rollouts is not None and encoded.stream is None:
        prompts = prompts_of(encoded.train, rollouts, config, student)
        _say("rollout", prompts)
        if not len(prompts.learned):
            _refuse_data(rollouts, config)
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
    """Return the prompts of encoded rows; those that leave room for the longest text are continued.

    The room is `task.max_length`, or the context of the student if it is smaller. `section` of the
    config, named `key`, asks for the texts.
    """
    room, limit, remedy = config.task.row_length, "task.max_length", "raise task.max_length"
    context = context_length(student.config)
    if context is not None and context < room:
        room, limit, remedy = context, f"the context of {student.where}", "shorten the prompts"
    most = room - section.longest
    prompts = Prompts(rows, prompt_tokens=section.prompt_tokens, most=most, key=key)
    if not len(prompts.continued):
        lengths = prompts.lengths[prompts.lengths > 0]
        shortest = lengths.min(initial=room)
        raise ConfigError(
            f"{key}.max_new_tokens: {section.longest} leaves {most} tokens of {limit} ({room}) for "
            f"the prompt, and none of the {len(lengths)} prompts in {len(rows)} rows is that short "
            f"(the shortest has {shortest}); set {key}.max_new_tokens to at most "
            f"{max(room - shortest, 1)}, or {remedy}"
        )
    return prompts


def _say(key: str, prompts: Prompts) -> None:
    rows, used, some = len(prompts.lengths), len(prompts.continued), (prompts.lengths > 0).sum()
    logger.log(
        logging.WARNING if used < rows else logging.INFO,
        "%s: %d of %d rows have a prompt that is continued; %d prompts leave no room for "
        "max_new_tokens, %d rows have no prompt, %d rows have no answer to learn from",
        key,
        *(used, rows, some - used, rows - some, rows - len(prompts.learned)),
    )


def _refuse_data(rollouts: RolloutConfig, config: RunConfig) -> None:
    uses = {
        f"rollout.mix.data ({rollouts.mix.get('data', 0):g})": rollouts.mix.get("data"),
        f"rollout.from_step ({rollouts.from_step})": rollouts.from_step,
        f"method.name ({config.method.name})": config.method.cuts_student,
        "baselines": config.baselines,
        "finetune": any(spec.finetune for spec in config.teacher_specs.values()),
    }
    if any(uses.values()):
        raise ConfigError(
            f"{', '.join(key for key, does in uses.items() if does)}: learns from the data, and "
            "all training rows are prompts without an answer; give the answers in a column "
            "completion (task.completion_column), or train on generated texts alone"
        )
