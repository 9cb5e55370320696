"""Checks of the section `task` that need neither data nor models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megakd.config.chat_checks import chat_problems
from megakd.config.task import TokenizerConfig
from megakd.config.training_checks import trainings
from megakd.contract.tasks import LANGUAGE_TASKS

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.config.task import TaskConfig


def task_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of the task and its data."""
    task = config.task
    yield from _files(task)
    yield from _other_tasks(task)
    yield from chat_problems(task)
    if task.dataset == "pydocs":
        columns = ("messages_column", "prompt_column", "completion_column")
        for key in ("text_columns", "label_column", "dataset_config", *columns):
            if getattr(task, key) is not None:
                yield f"task.{key}: not supported with task.dataset pydocs; remove the key"
    if task.encoded is not None:
        yield from _encoded(config)
    if task.streaming and task.type in LANGUAGE_TASKS:
        yield from _stream(task)
        yield from _stream_of_run(config)


def _encoded(config: RunConfig) -> Iterator[str]:
    """Yield the settings that need the texts, which a folder of encoded data does not hold."""
    if config.task.streaming:
        yield (
            "task.encoded: cannot be combined with task.streaming, which reads texts during "
            "training; remove one of the two"
        )
    if config.method.own_vocabulary is not None:
        yield (
            f"task.encoded: method {config.method.name} trains a vocabulary on the texts, and the "
            "folder holds no texts; remove the key"
        )


def _files(task: TaskConfig) -> Iterator[str]:
    if task.dataset is None and task.train_files is None and task.mixture is None:
        yield (
            "task.dataset: missing, and it has no default; set task.dataset or task.train_files, "
            "or task.mixture for several sources"
        )
    if task.dataset is not None:
        for key in ("train_files", "validation_files", "test_files", "mixture"):
            if getattr(task, key) is not None:
                yield (
                    f"task.{key}: cannot be combined with task.dataset, which has its own splits; "
                    "remove one of the two (task.evaluation_sets takes files that are only scored)"
                )
    elif task.data_dir is not None or task.dataset_config is not None:
        key = "data_dir" if task.data_dir is not None else "dataset_config"
        yield (
            f"task.{key}: supported only with task.dataset, and task.{_files_key(task)} is set; "
            "remove the key"
        )


def _files_key(task: TaskConfig) -> str:
    return "train_files" if task.mixture is None else "mixture"


def _other_tasks(task: TaskConfig) -> Iterator[str]:
    if task.labelled_examples is not None and task.type in LANGUAGE_TASKS:
        yield (
            "task.labelled_examples: supported only for classification and regression, and "
            f"task.type is {task.type}; remove the key"
        )
    for key, given in {
        "mlm_probability": task.mlm_probability is not None,
        "whole_word_masking": task.whole_word_masking,
    }.items():
        if given and task.type != "mlm":
            yield (
                f"task.{key}: supported only for mlm, and task.type is {task.type}; remove the key"
            )
    if task.streaming and task.type not in LANGUAGE_TASKS:
        yield (
            f"task.streaming: supported only for mlm and causal_lm, and task.type is {task.type}; "
            "remove the key"
        )


def _stream(task: TaskConfig) -> Iterator[str]:
    if task.dataset == "pydocs" or (task.dataset or "").startswith("glue/"):
        yield (
            f"task.streaming: task.dataset {task.dataset} is small and is always read before "
            "training; remove the key, or name files or a data set of the Hub"
        )
    if task.train_files is not None and not (task.validation_files or task.max_eval_examples):
        yield (
            "task.streaming: a stream has no end, so no share of it can be held out; set "
            "task.validation_files, or set task.max_eval_examples to hold out this many texts "
            "from the beginning of task.train_files"
        )
    if isinstance(task.tokenizer, TokenizerConfig):
        yield (
            f"task.tokenizer: a {task.tokenizer.type} cannot be trained on a stream "
            "(task.streaming is true); set a folder or a Hub id, or train the tokenizer in a run "
            "without task.streaming on a part of the text"
        )


def _stream_of_run(config: RunConfig) -> Iterator[str]:
    """Yield the settings of other sections that need training rows of a known number."""
    unlimited = [where for where, train in trainings(config) if train.max_steps is None]
    # The other sections inherit the key of `train`.
    for where in unlimited[:1] if "train" in unlimited else unlimited:
        yield (
            f"{where}.max_steps: missing, and task.streaming is true: a stream has no end, so "
            f"num_train_epochs says nothing about its length; set {where}.max_steps, or remove "
            "task.streaming"
        )
    for name, spec in config.teacher_specs.items():
        if spec.cache is not None:
            yield (
                f"{config.key_of(name)}.cache: holds one answer per training row, and the rows of "
                "a stream have no numbers (task.streaming is true); remove one of the two"
            )
