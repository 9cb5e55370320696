"""Checks of the loss terms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

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
        yield from problems(_TERM, case)
        for name in config.teacher_specs:
            parts = (Case(config, case.key, part) for part in _parts(config, name, term))
            yield from problems(_PARTS, *parts)


_OPTIONS: tuple[Rule[TermConfig], ...] = (
    *only(".row_weight", ("classification", "regression"), ", which have one label per row"),
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
_TERM: tuple[Rule[TermConfig], ...] = (
    Rule(
        lambda c: compares(c.item) and not (c.method.needs_teacher or c.config.teacher_specs),
        ".loss",
        '{item.loss} compares with a teacher, and method "{method}" has no teacher; remove the '
        "term or choose another method",
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


class _TermPart(NamedTuple):
    """A term with the key that replaces a teacher by some of its outputs."""

    term: TermConfig
    source: str
    held: str
    """The part of the probabilities that the source has; empty: all."""
    remedy: str


def _parts(config: RunConfig, name: str, term: TermConfig) -> Iterator[_TermPart]:
    spec, key = config.teacher_specs[name], config.key_of(name)
    largest = "the largest probabilities"
    if spec.cache is not None:
        held = largest if spec.cache_draws is None else "random draws"
        yield _TermPart(term, f"{key}.cache", held if config.task.type == "causal_lm" else "", "")
    if spec.server is not None:
        remedy = f"export hidden states with {key}.server.states, or "
        yield _TermPart(term, f"{key}.server", "" if spec.server.states else largest, remedy)


_PARTS: tuple[Rule[_TermPart], ...] = (
    Rule(
        lambda c: looks_inside(c.item.term),
        ".loss",
        "{item.term.loss} needs more than the outputs of the teacher, and {item.source} holds only "
        "outputs; remove {item.source} or the term",
    ),
    Rule(
        lambda c: (
            c.item.held and isinstance(c.item.term, SoftTargetKl) and c.item.term.temperature != 1
        ),
        ".loss",
        "{item.term.loss} at temperature {item.term.temperature:g}: {item.source} holds only "
        "{item.held}, at temperature 1; set temperature to 1, or {item.remedy}remove {item.source}",
    ),
    Rule(
        lambda c: c.item.held and _needs_all(c.item.term),
        ".loss",
        "{item.term.loss} needs all probabilities of the teacher, and {item.source} holds only "
        "{item.held}, which suffice for soft_target_kl alone; {item.remedy}remove {item.source} or "
        "the term",
    ),
)


def _needs_all(term: TermConfig) -> bool:
    return compares(term) and not looks_inside(term) and not isinstance(term, SoftTargetKl)
