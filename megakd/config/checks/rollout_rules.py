"""Checks of the sections `rollout` and `eval.generation`."""

from __future__ import annotations

from collections.abc import Iterator

from megakd.config.checks.rules import Case, Rule, conflict, given, problems
from megakd.config.rollout import RolloutConfig, RolloutServerConfig
from megakd.config.run import RunConfig
from megakd.contract.options import no_such_teacher
from megakd.contract.tasks import STUDENT
from megakd.contract.terms import HardCrossEntropy, source_of


def rollout_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of training on generated texts, and of evaluating them."""
    yield from problems(_TEXTS, Case(config, "", config))
    rollouts = config.rollout
    if rollouts is None:
        return
    yield from problems(_ROLLOUT, Case(config, "rollout", rollouts))
    if rollouts.by != STUDENT and rollouts.by not in config.teacher_specs:
        yield no_such_teacher(config, "rollout.by", rollouts.by)
    # Without `on`, a term learns from all texts; without `objective`, the terms have no `on`.
    taught = {source_of(term) for term in config.objective} if config.objective else {None}
    drawn = rollouts.draws
    untaught = () if None in taught else sorted(drawn - taught)
    for source in untaught:
        yield (
            f"objective: no term learns from {source}, which rollout.mix or rollout.from_step "
            f"draws; add a term without on or with on: {source}, or change the section rollout"
        )
    writes_itself = rollouts.by == STUDENT and "rollouts" in drawn
    for index, term in enumerate(config.objective or ()):
        source = source_of(term)
        if source not in {None, *drawn} and not untaught:
            yield (
                f"objective[{index}].on: {source}, and with rollout.mix {rollouts.mix:g} no step "
                "learns from them, so that the term would be 0; change rollout.mix, or remove the "
                "term"
            )
        is_hard = isinstance(term, HardCrossEntropy) and term.weight > 0
        if is_hard and writes_itself and source != "data":
            yield (
                f"objective[{index}].on: {source or 'null'}, so that {term.loss} would take texts "
                "that the student writes (rollout.by: student) as labels; set the key to data "
                "with rollout.mix below 1, or remove the term"
            )
    if rollouts.server is not None:
        yield from problems(_SERVER, Case(config, "rollout.server", rollouts.server))


_TEXTS: tuple[Rule[RunConfig], ...] = (
    *given(
        "rollout eval.generation",
        lambda c: c.task.type != "causal_lm",
        "supported only for causal_lm, whose models generate text, and task.type is {task.type}; "
        "remove the section",
    ),
    *given(
        "eval.generation.answer",
        lambda c: not c.is_set("eval.generation.match"),
        "chooses what eval.generation.match compares, which is not set; set it, or remove the key",
    ),
)
_ROLLOUT: tuple[Rule[RolloutConfig], ...] = (
    Rule(
        lambda c: not c.method.learns_from_rollouts,
        "",
        'method "{method}" does not train on generated texts; set method.name to '
        "{methods[learns_from_rollouts]}, or remove the section",
    ),
    *conflict("rollout", "task.streaming", ", because prompts are taken from rows on disk"),
    *given(
        ".by",
        lambda c: c.item.by in c.config.base_teachers and c.item.server is None,
        "{item.by} is the student without its adapters, which generates no texts; set the key to "
        "student",
    ),
)
_SERVER: tuple[Rule[RolloutServerConfig], ...] = (
    Rule(
        lambda c: c.config.served_model is None,
        ".model",
        "missing, and the config names no model that the servers could serve; set "
        "rollout.server.model to the name of the served model",
    ),
    Rule(
        lambda c: c.item.push == "adapter" and c.config.student.lora is None,
        ".push",
        "adapter pushes the adapters of the student, and student.lora is not set; add "
        "student.lora, or set push to full",
    ),
    Rule(
        lambda c: c.item.push != "none" and c.is_set("rollout.by"),
        ".push",
        "{item.push} pushes the weights of the student, and rollout.by is {config.rollout.by}, "
        "whose weights do not change; set push to none",
    ),
    Rule(
        lambda c: c.item.folder is None and c.item.push != "none",
        ".folder",
        "missing with push: {item.push}; weights are pushed through a folder that rank 0 and all "
        "servers see",
    ),
    *given(
        ".folder",
        lambda c: c.item.push == "none",
        "is not used with push: none; weights are pushed through a folder that rank 0 and all "
        "servers see",
    ),
)
