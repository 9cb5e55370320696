"""Checks of rows that name their teachers which need neither data nor models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megakd.contract.options import no_such_teacher
from megakd.methods import methods_with_routes

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.config.task import TaskConfig


def route_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of `task.teacher_column` and of `task.mixture.<name>.teacher`."""
    task = config.task
    given = {f"task.mixture.{n}.teacher": p.teacher for n, p in (task.mixture or {}).items()}
    named = {key: name for key, name in given.items() if name is not None}
    if not config.method.routes_rows:
        keys = [*(["task.teacher_column"] if task.teacher_column is not None else []), *named]
        for key in keys:
            yield (
                f'{key}: method "{config.method.name}" does not choose teachers by row; set '
                f"method.name to {' or '.join(methods_with_routes())}, or remove the key"
            )
        return
    yield from _teachers_of_rows(task, [key for key, name in given.items() if name is None], named)
    for key, name in named.items():
        if name not in config.teacher_specs:
            yield no_such_teacher(config, key, name)
    yield from _data(config)


def _teachers_of_rows(task: TaskConfig, unnamed: list[str], named: dict[str, str]) -> Iterator[str]:
    if task.teacher_column is None and (unnamed or not named):
        key = "task.teacher_column"
        other = "or, in a mixture, set task.mixture.<name>.teacher of every source"
        if named:
            key, other = unnamed[0], "set task.teacher_column for this source"
        yield (
            f"{key}: missing, and every training row has to name its teacher; set the key, {other}"
        )
    if task.teacher_column is not None and named and not unnamed:
        yield (
            "task.teacher_column: is not read, because every source of task.mixture names its "
            "teacher; remove one of the two"
        )


def _data(config: RunConfig) -> Iterator[str]:
    task, method = config.task, config.method.name
    if task.dataset is not None and (task.dataset == "pydocs" or task.dataset.startswith("glue/")):
        yield (
            f"task.dataset: the rows of {task.dataset} name no teachers, which method {method} "
            "needs; use files, a folder or a data set of the Hub with a column of teachers"
        )
    for key, given in {"streaming": task.streaming, "encoded": task.encoded is not None}.items():
        if given:
            yield (
                f"task.{key}: not supported by method {method}, which counts the rows of each "
                "teacher before training; remove the key"
            )
    if config.eval.losses:
        yield (
            "eval.losses: compares held-out rows with the teachers, and only training rows name a "
            f"teacher (method {method}); remove the key"
        )
