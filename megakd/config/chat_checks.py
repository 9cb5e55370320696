"""Checks of the keys of conversations and mixtures that need neither data nor models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megakd.config.task import TaskConfig

# The keys of conversations, and the value of a config that does not set the key.
CHAT_KEYS = {
    "messages_column": None,
    "prompt_column": None,
    "completion_column": None,
    "chat_template": None,
    "chat_template_kwargs": {},
    "reasoning": "keep",
    "train_on": "all",
    "truncation": "keep_start",
    "end_tokens": "check",
    "mixture": None,
}


def chat_problems(task: TaskConfig) -> Iterator[str]:
    """Yield the problems of the keys of conversations and of the mixture."""
    given = [key for key, default in CHAT_KEYS.items() if getattr(task, key) != default]
    if task.type != "causal_lm":
        for key in given:
            yield (
                f"task.{key}: supported only for causal_lm, and task.type is {task.type}; remove "
                "the key"
            )
        return
    yield from _columns(task, given)
    if task.chat_template is not None and not Path(task.chat_template).expanduser().is_file():
        yield (
            f"task.chat_template: the file {task.chat_template} does not exist; give a file with a "
            "chat template in Jinja, or remove the key to use the tokenizer's"
        )
    yield from _mixture(task)


def _columns(task: TaskConfig, given: list[str]) -> Iterator[str]:
    named = [key for key in given if key.endswith("_column")]
    if named and task.text_columns is not None:
        yield (
            f"task.{named[0]}: cannot be combined with task.text_columns, which names the columns "
            "of documents; remove one of the two"
        )
    if "messages_column" in named and len(named) > 1:
        yield (
            f"task.{named[1]}: cannot be combined with task.messages_column, whose messages hold "
            "the prompts and the answers; remove one of the two"
        )
    if named == ["completion_column"]:
        yield (
            "task.prompt_column: missing, and task.completion_column is set; name the column of "
            "the prompts"
        )


def _mixture(task: TaskConfig) -> Iterator[str]:
    if task.mixture is None:
        return
    if not task.mixture:
        yield "task.mixture: has no source; name at least one source with files and weight"
    if task.train_files is not None:
        yield "task.mixture: cannot be combined with task.train_files; remove one of the two"
    if task.streaming:
        yield (
            "task.mixture: cannot be combined with task.streaming, because the rows of a source "
            "are counted before training; remove one of the two"
        )
