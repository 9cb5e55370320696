"""Checks of the loss terms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megakd.config.checks.rules import Case, Rule, given, only, problems
from megakd.config.run import RunConfig
from megakd.contract.tasks import LANGUAGE_TASKS
from megakd.contract.terms import (
    SOFT_TARGET_DIVERGENCES,
    HardCrossEntropy,
    HardMse,
    PluginTerm,
    SoftTargetKl,
    SoftTargetMse,
    TermConfig,
    compares,
    looks_inside,
    source_of,
)


def objective_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of terms with each other, the task, the method and the teachers."""
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
        case = Case(config, f"objective[{index}]", term)
        # A loss of another package may have options of the same names.
        yield from problems(() if isinstance(term, PluginTerm) else _OPTIONS, case)
        if config.task.type not in (tasks := _tasks_of(term)):
            yield (
                f"{case.key}.loss: {term.loss} supports only task.type {', '.join(tasks)}, and "
                f"task.type is {config.task.type}; remove the term"
            )
            continue
        if compares(term) and not (config.method.needs_teacher or config.teacher_specs):
            yield (
                f"{case.key}.loss: {term.loss} compares with a teacher, and method "
                f'"{config.method.name}" has no teacher; remove the term or choose another method'
            )
        for name in config.teacher_specs:
            wrong = _output_problems(config, name, term)
            yield from (f"{case.key}.loss: {term.loss} {problem}" for problem in wrong)


_OPTIONS: tuple[Rule[TermConfig], ...] = (
    *only(
        ".class_weights .label_smoothing",
        ("classification",),
        ", whose loss forms all probabilities",
    ),
    *only(".count", ("classification",), ", which has rows without labels"),
    *given(
        ".on",
        lambda c: c.task.type != "causal_lm",
        "{item.on} limits the term to some of the next tokens, and only task.type causal_lm "
        "predicts next tokens; task.type is {task.type}; remove the key",
    ),
    Rule(
        lambda c: (
            source_of(c.item) == "rollouts"
            and c.task.type == "causal_lm"
            and c.config.rollout is None
        ),
        ".on",
        "rollouts, and this run generates no texts, so the term would be 0 at every step; add the "
        "section rollout, or remove the key",
    ),
)


def _tasks_of(term: TermConfig) -> tuple[str, ...]:
    if isinstance(term, PluginTerm):
        return term.tasks
    if isinstance(term, HardMse | SoftTargetMse):
        return ("regression",)
    classes = ("classification", *LANGUAGE_TASKS)
    of_classes = isinstance(term, (HardCrossEntropy, *SOFT_TARGET_DIVERGENCES))
    return classes if of_classes else ("classification", "regression", *LANGUAGE_TASKS)


def _output_problems(config: RunConfig, name: str, term: TermConfig) -> Iterator[str]:
    # The keys that replace a teacher by some of its outputs, with the part of the probabilities
    # that they hold (empty: all).
    spec, key = config.teacher_specs[name], config.key_of(name)
    largest, sources = "the largest probabilities", list[tuple[str, str]]()
    if spec.cache is not None:
        held = largest if spec.cache_draws is None else "random draws"
        sources.append((f"{key}.cache", held if config.task.type == "causal_lm" else ""))
    if spec.server is not None:
        sources.append((f"{key}.server", largest))
    for source, held in sources:
        if looks_inside(term):
            yield (
                f"needs more than the outputs of the teacher, and {source} holds only outputs; "
                f"remove {source} or the term"
            )
        elif held and isinstance(term, SoftTargetKl) and term.temperature != 1:
            yield (
                f"at temperature {term.temperature:g}: {source} holds only {held}, at temperature "
                f"1; set temperature to 1, or remove {source}"
            )
        elif held and compares(term) and not isinstance(term, SoftTargetKl):
            yield (
                f"needs all probabilities of the teacher, and {source} holds only {held}, which "
                f"suffice for soft_target_kl alone; remove {source} or the term"
            )
