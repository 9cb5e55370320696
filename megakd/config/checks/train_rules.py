"""Checks of the sections `train`, `eval`, `baselines` and `alone`, and of other trainings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megakd.config.checks.rules import Case, Rule, given, only, problems
from megakd.config.run import EvalConfig, RunConfig
from megakd.config.train import TrainConfig
from megakd.contract.plugins import is_metric, metric_of
from megakd.contract.tasks import LANGUAGE_TASKS, METRICS
from megakd.contract.terms import HiddenCosine, HiddenMse, PluginTerm, RelationFsp, TermConfig
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
