"""Checks of `train.tokens_per_rank` that need neither data nor models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megakd.config.training_checks import trainings
from megakd.contract.terms import HiddenCosine, HiddenMse, PluginTerm, RelationFsp

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.contract.terms import TermConfig


def token_budget_problems(config: RunConfig) -> Iterator[str]:
    """Yield the settings that cannot be combined with rows packed by a token budget."""
    budgets = {
        where: train.tokens_per_rank
        for where, train in trainings(config)
        if train.tokens_per_rank is not None
    }
    if "train" in budgets:  # the other sections inherit the key, unless they have their own value
        own = {w: tokens for w, tokens in budgets.items() if tokens != budgets["train"]}
        budgets = {"train": budgets["train"], **own}
    for where, tokens in budgets.items():
        yield from _of_task(config, f"{where}.tokens_per_rank", tokens)
    if budgets:
        yield from _of_run(config, f"{next(iter(budgets))}.tokens_per_rank")


def _of_task(config: RunConfig, key: str, tokens: int) -> Iterator[str]:
    task = config.task
    if task.type != "causal_lm":
        yield (
            f"{key}: supported only for causal_lm, whose attention separates the texts in a row, "
            f"and task.type is {task.type}; remove the key"
        )
    elif task.max_length is not None and tokens < task.max_length:
        yield (
            f"{key}: {tokens} is less than task.max_length {task.max_length}, and a row is never "
            f"split; set {key} to at least {task.max_length}, or lower task.max_length"
        )


def _of_run(config: RunConfig, key: str) -> Iterator[str]:
    """Yield the settings of other sections that need one text per row."""
    if config.task.type != "causal_lm":
        return
    if config.task.streaming:
        yield (
            f"{key}: packs the rows of all ranks together, and with task.streaming every rank "
            "reads rows of its own; remove one of the two"
        )
    for name, spec in config.teacher_specs.items():
        if spec.cache is not None:
            yield (
                f"{config.key_of(name)}.cache: holds one answer per training row, and {key} packs "
                "several rows into one; remove one of the two"
            )
    for index, term in enumerate(config.objective or ()):
        if _counts_rows(term):
            yield (
                f"objective[{index}].loss: {term.loss} is averaged over rows, and {key} packs "
                "several rows into one; remove the key or the term"
            )


def _counts_rows(term: TermConfig) -> bool:
    if isinstance(term, HiddenMse | HiddenCosine):
        return term.positions == "first"
    if isinstance(term, PluginTerm):
        return term.unit == "examples"
    return isinstance(term, RelationFsp)
