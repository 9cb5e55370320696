"""Checks of trainings, their objectives and generated texts, and of `eval` and `baselines`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megakd.config.checks.rules import Case, Rule, conflict, given, only, problems
from megakd.config.rollout import RolloutConfig, RolloutServerConfig
from megakd.config.run import EvalConfig, RunConfig
from megakd.config.train import TrainConfig
from megakd.contract.options import no_such_teacher
from megakd.contract.plugins import is_metric, metric_of
from megakd.contract.tasks import LANGUAGE_TASKS, METRICS, STUDENT
from megakd.contract.terms import (
    SOFT_TARGET_DIVERGENCES,
    HardCrossEntropy,
    HardMse,
    HiddenCosine,
    HiddenMse,
    PluginTerm,
    RelationFsp,
    SoftTargetKl,
    SoftTargetMse,
    TermConfig,
    compares,
    looks_inside,
    source_of,
)
from megakd.errors import ConfigError, suggestion
from megakd.methods import baselines_of


def training_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of all trainings, of the baselines and of the evaluations."""
    yield from _baselines(config)
    for where, train in config.trainings.items():
        yield from problems(_TRAINING, Case(config, where, train))
    for where, overrides in config.overrides.items():
        if overrides.collective_timeout is not None:
            yield (
                f"{where}.collective_timeout: the limit holds for the whole run; remove the key, "
                "and set train.collective_timeout"
            )
        if overrides.packing is not None:
            yield (
                f"{where}.packing: the texts are encoded once for the whole run; remove the key, "
                "and set train.packing"
            )
    yield from problems(_PACKING, Case(config, "train", config.train))
    yield from _budgets(config)
    yield from problems(_EVALUATION, Case(config, "eval", config.eval))
    yield from _metrics(config)


_TRAINING: tuple[Rule[TrainConfig], ...] = (
    *given(
        ".early_stopping_patience",
        lambda c: c.config.eval.eval_steps is None,
        "{item.early_stopping_patience} counts evaluations, and eval.eval_steps is not set; set "
        "eval.eval_steps, or remove the key",
    ),
    *given(
        ".activation_offload",
        lambda c: not c.item.gradient_checkpointing,
        "moves the inputs of checkpointed layers to host memory, and gradient_checkpointing is "
        "false; set {key}.gradient_checkpointing to true, or remove the key",
    ),
    Rule(
        lambda c: c.item.bf16 and c.item.fp16 and c.key == "train",
        "",
        "bf16 and fp16 are both true; set one of them to false",
    ),
    Rule(
        lambda c: c.item.bf16 and c.item.fp16 and not (c.config.train.bf16 and c.config.train.fp16),
        "",
        "bf16 and fp16 are both true (a key that is not set here is inherited from train); set one "
        "of them to false here",
    ),
)


def _baselines(config: RunConfig) -> Iterator[str]:
    if config.alone is not None and "alone" not in config.baselines:
        yield "alone: baselines does not list alone; add baselines: [alone], or remove the section"
    known = baselines_of(config.method)
    for name, count in Counter(config.baselines).items():
        if name not in known:
            yield (
                f'baselines: method "{config.method.name}" has no baseline '
                f'"{name}"{suggestion(name, known)} (known: {", ".join(known)})'
            )
        if count > 1:
            yield f'baselines: "{name}" is listed {count} times; list every baseline once'


def _budgets(config: RunConfig) -> Iterator[str]:
    budgets = {
        f"{where}.tokens_per_rank": Case(config, where, train)
        for where, train in config.trainings.items()
        # The other sections inherit the key of `train`, unless they have their own value.
        if train.tokens_per_rank is not None
        and (where == "train" or train.tokens_per_rank != config.train.tokens_per_rank)
    }
    yield from problems(_BUDGET, *budgets.values())
    if not budgets or config.task.type != "causal_lm":
        return
    budget = next(iter(budgets))
    for name, spec in config.teacher_specs.items():
        if spec.cache is not None:
            yield (
                f"{config.key_of(name)}.cache: holds one answer per training row, and {budget} "
                "packs several rows into one; remove one of the two"
            )
    for index, term in enumerate(config.objective or ()):
        if _counts_rows(term):
            yield (
                f"objective[{index}].loss: {term.loss} is averaged over rows, and {budget} packs "
                "several rows into one; remove the key or the term"
            )


_PACKING: tuple[Rule[TrainConfig], ...] = only(
    ".packing", ("causal_lm",), ", whose rows may have several texts"
)
_BUDGET: tuple[Rule[TrainConfig], ...] = (
    *only(".tokens_per_rank", ("causal_lm",), ", whose attention separates the texts in a row"),
    *given(
        ".tokens_per_rank",
        lambda c: (
            c.task.type == "causal_lm" and (c.item.tokens_per_rank or 0) < (c.task.max_length or 0)
        ),
        "{item.tokens_per_rank} is less than task.max_length {task.max_length}, and a row is never "
        "split; set {key}.tokens_per_rank to at least {task.max_length}, or lower task.max_length",
    ),
    *given(
        ".tokens_per_rank",
        lambda c: c.config.train.packing is False,
        "packs several rows into one, and train.packing is false; remove one of the two",
    ),
    *given(
        ".tokens_per_rank",
        lambda c: c.task.streaming,
        "packs the rows of all ranks together, and with task.streaming every rank reads rows of "
        "its own; remove one of the two",
    ),
)


def _counts_rows(term: TermConfig) -> bool:
    if isinstance(term, HiddenMse | HiddenCosine):
        return term.positions == "first"
    if isinstance(term, PluginTerm):
        return term.unit == "examples"
    return isinstance(term, RelationFsp)


_EVALUATION: tuple[Rule[EvalConfig], ...] = (
    Rule(
        lambda c: c.item.keep_best and c.item.eval_steps is None,
        ".keep_best",
        "true needs evaluations during training; set eval.eval_steps, or remove the key",
    ),
    *only(".positive_label", ("classification",), ", whose labels have names"),
)


def _metrics(config: RunConfig) -> Iterator[str]:
    task, known = config.task.type, METRICS[config.task.type]
    listed = {f"metrics[{index}]": name for index, name in enumerate(config.eval.metrics)}
    for key, name in {"metric": config.eval.metric, **listed}.items():
        if name is None or name in known:
            continue
        if not is_metric(name):
            near = suggestion(name, known) or ";"
            yield (
                f'eval.{key}: task.type {task} has no metric "{name}"{near} known: '
                f"{', '.join(known)}"
            )
        elif task in LANGUAGE_TASKS:
            yield (
                f"eval.{key}: {name} needs the outputs of all rows at once, which task.type {task} "
                "does not form; remove the metric"
            )
        else:
            try:
                metric_of(name)
            except ConfigError as error:
                yield f"eval.{key}: {error}"


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
