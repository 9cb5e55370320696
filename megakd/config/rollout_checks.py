"""Checks of the section `rollout` that need neither data nor models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megakd.contract.options import no_such_teacher
from megakd.contract.tasks import STUDENT
from megakd.contract.term_names import source_of
from megakd.methods import methods_with_rollouts

if TYPE_CHECKING:
    from megakd.config.rollout import RolloutConfig
    from megakd.config.run import RunConfig


def rollout_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of training on generated texts, and of evaluating them."""
    for key, section in (("rollout", config.rollout), ("eval.generation", config.eval.generation)):
        if section is not None and config.task.type != "causal_lm":
            yield (
                f"{key}: only causal_lm models generate text, and task.type is "
                f"{config.task.type}; remove the section"
            )
    if config.rollout is None:
        return
    if not config.method.learns_from_rollouts:
        yield (
            f'rollout: method "{config.method.name}" does not train on generated texts; set '
            f"method.name to {' or '.join(methods_with_rollouts())}, or remove the section"
        )
    yield from _rows(config)
    yield from _terms(config.rollout, config)
    yield from _generator(config.rollout, config)


def _rows(config: RunConfig) -> Iterator[str]:
    if config.task.streaming:
        yield (
            "rollout: prompts are taken from rows on disk, and task.streaming is true; set "
            "task.streaming to false"
        )
    for name, spec in config.teacher_specs.items():
        if spec.cache is not None:
            yield (
                f"{config.key_of(name)}.cache: holds answers to the training rows, and rollout "
                "trains on other texts; remove one of the two"
            )


def _terms(rollouts: RolloutConfig, config: RunConfig) -> Iterator[str]:
    if config.objective is None:
        return
    taught = {source_of(term) for term in config.objective}
    for source in rollouts.draws - taught if None not in taught else ():
        yield (
            f"objective: no term learns from {source}, which rollout.mix or rollout.from_step "
            f"draws; add a term without on or with on: {source}, or change the section rollout"
        )


def _generator(rollouts: RolloutConfig, config: RunConfig) -> Iterator[str]:
    if rollouts.by != STUDENT and rollouts.by not in config.teacher_specs:
        yield no_such_teacher(config, "rollout.by", rollouts.by)
    if rollouts.files is None:
        return
    if rollouts.max_staleness:
        yield (
            f"rollout.max_staleness: {rollouts.max_staleness} applies to texts that are generated "
            "during the run, and rollout.files is set; remove one of the two keys"
        )
    if rollouts.by != STUDENT:
        yield (
            f"rollout.by: {rollouts.by} does not generate texts if rollout.files is set; remove "
            "one of the two keys"
        )
