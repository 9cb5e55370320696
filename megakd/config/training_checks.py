"""Checks of the settings of training, evaluation and logging that need neither data nor models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megakd.config.messages import option_problems
from megakd.config.schedules import SCHEDULES
from megakd.config.train import inherit, schedule_problem
from megakd.contract.plugins import is_metric, metric_of
from megakd.contract.tasks import LANGUAGE_TASKS, METRICS
from megakd.contract.terms import HardCrossEntropy
from megakd.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.config.train import TrainConfig
    from megakd.contract.tasks import TaskType


def training_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of all training settings, the metrics, and the loss on labels."""
    for where, train in trainings(config):
        yield from _schedule(where, train)
        if train.early_stopping_patience is not None and config.eval.eval_steps is None:
            yield (
                f"{where}.early_stopping_patience: {train.early_stopping_patience} counts "
                "evaluations, and eval.eval_steps is not set; set eval.eval_steps, or remove the "
                "key"
            )
        if train.activation_offload and not train.gradient_checkpointing:
            yield (
                f"{where}.activation_offload: moves the inputs of checkpointed layers to host "
                f"memory, and gradient_checkpointing is false; set {where}.gradient_checkpointing "
                "to true, or remove the key"
            )
    yield from _limits(config)
    yield from _precision(config)
    yield from _metrics(config)
    yield from _hard_terms(config)


def _limits(config: RunConfig) -> Iterator[str]:
    own = {f"{config.key_of(n)}.finetune": s.finetune for n, s in config.teacher_specs.items()}
    for where, train in {**own, "alone": config.alone}.items():
        if train is not None and train.collective_timeout is not None:
            yield (
                f"{where}.collective_timeout: the limit holds for the whole run; remove the key, "
                "and set train.collective_timeout"
            )


def _precision(config: RunConfig) -> Iterator[str]:
    if config.train.bf16 and config.train.fp16:
        yield "train: bf16 and fp16 are both true; set one of them to false"
        return
    for where, train in trainings(config):
        if train.bf16 and train.fp16:
            yield (
                f"{where}: bf16 and fp16 are both true (a key that is not set here is inherited "
                "from train); set one of them to false here"
            )


def _metrics(config: RunConfig) -> Iterator[str]:
    task, known = config.task.type, METRICS[config.task.type]
    listed = {f"metrics[{index}]": name for index, name in enumerate(config.eval.metrics)}
    for key, name in {"metric": config.eval.metric, **listed}.items():
        if name is None or name in known:
            continue
        if is_metric(name):
            yield from _plugin_metric(name, f"eval.{key}", task)
        else:
            near = suggestion(name, known) or ";"
            yield (
                f'eval.{key}: task.type {task} has no metric "{name}"{near} known: '
                f"{', '.join(known)}"
            )
    if config.eval.positive_label is not None and task != "classification":
        yield f"eval.positive_label: task.type {task} has no named labels; remove the key"


def _plugin_metric(name: str, where: str, task: TaskType) -> Iterator[str]:
    if task in LANGUAGE_TASKS:
        yield (
            f"{where}: {name} needs the outputs of all rows at once, which task.type {task} does "
            "not form; remove the metric"
        )
        return
    try:
        metric_of(name)
    except ConfigError as error:
        yield f"{where}: {error}"


def _hard_terms(config: RunConfig) -> Iterator[str]:
    if config.task.type not in LANGUAGE_TASKS:
        return
    for index, term in enumerate(config.objective or ()):
        for key in ("class_weights", "label_smoothing"):
            if isinstance(term, HardCrossEntropy) and getattr(term, key):
                yield (
                    f"objective[{index}].{key}: supported only for classification, and task.type "
                    f"is {config.task.type}, whose loss does not form the probabilities of all "
                    "tokens; remove the key"
                )


def trainings(config: RunConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Yield key and settings of every training of the run, with inherited keys."""
    yield "train", config.train
    for name, spec in config.teacher_specs.items():
        if spec.finetune is not None:
            yield f"{config.key_of(name)}.finetune", inherit(config.train, spec.finetune)
    if config.alone is not None:
        yield "alone", inherit(config.train, config.alone)


def _schedule(where: str, train: TrainConfig) -> Iterator[str]:
    kind = SCHEDULES[train.lr_scheduler_type]
    key = f"{where}.lr_scheduler_kwargs"
    problems = option_problems(kind, train.lr_scheduler_kwargs or {}, where=key)
    if problems:
        yield from (f"{problem} (of {train.lr_scheduler_type})" for problem in problems)
        return
    problem = schedule_problem(train, train.max_steps)
    if problem:
        yield f"{where}.lr_scheduler_type: {problem}"
