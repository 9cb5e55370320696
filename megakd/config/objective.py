"""Checks of the loss terms of a config that need neither data nor models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megakd.contract.tasks import LANGUAGE_TASKS
from megakd.contract.term_names import source_of
from megakd.contract.terms import (
    SOFT_TARGET_DIVERGENCES,
    HardCrossEntropy,
    HardMse,
    PluginTerm,
    SoftTargetMse,
    compares,
)

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.contract.terms import TermConfig

_OF_CLASSES = (HardCrossEntropy, *SOFT_TARGET_DIVERGENCES)
_OF_SCORES = (HardMse, SoftTargetMse)
_TASKS = ("classification", "regression", *LANGUAGE_TASKS)


def objective_problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for terms that contradict each other, the task, or a method without teacher."""
    terms = config.objective or ()
    for (name, source), count in Counter((term.loss, source_of(term)) for term in terms).items():
        if count > 1:
            on = f" with on: {source}" if source else ""
            yield (
                f'objective: "{name}"{on} is listed {count} times; keep one term and set its weight'
            )
    if terms and not any(term.weight for term in terms):
        yield "objective: every weight is 0; set at least one weight above 0"
    for index, term in enumerate(terms):
        yield from _term(config, term, f"objective[{index}]")


def _term(config: RunConfig, term: TermConfig, key: str) -> Iterator[str]:
    task, where = config.task.type, f"{key}.loss: {term.loss}"
    if getattr(term, "row_weight", "equal") != "equal" and task in LANGUAGE_TASKS:
        yield (
            f"{key}.row_weight: needs one label per row, which task.type {task} does not have; "
            "remove the key"
        )
    if source_of(term) == "rollouts" and task == "causal_lm" and config.rollout is None:
        yield (
            f"{key}.on: rollouts, and this run generates no texts, so the term would be 0 at every "
            "step; add the section rollout, or remove the key"
        )
    if source_of(term) is not None and task != "causal_lm":
        yield (
            f"{key}.on: {source_of(term)} limits the term to some of the next tokens, and only "
            f"task.type causal_lm predicts next tokens; task.type is {task}; remove the key"
        )
    fitting = _tasks_of(term)
    if task not in fitting:
        yield (
            f"{where} supports only task.type {', '.join(fitting)}, and task.type is {task}; "
            "remove the term"
        )
    elif compares(term) and not (config.method.needs_teacher or config.teacher_specs):
        yield (
            f'{where} compares with a teacher, and method "{config.method.name}" has no teacher; '
            "remove the term or choose another method"
        )


def _tasks_of(term: TermConfig) -> tuple[str, ...]:
    if isinstance(term, PluginTerm):
        return term.tasks
    if isinstance(term, _OF_SCORES):
        return ("regression",)
    return tuple(t for t in _TASKS if t != "regression" or not isinstance(term, _OF_CLASSES))
