"""Routed teachers: every training row names the teacher that it learns from.

For one student and one expert per domain. The loss of a row is the row's loss with its own teacher,
and a step divides the sum over the rows of all teachers by the counts of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from megakd.config.options import MethodOptions, no_such_teacher
from megakd.config.terms import STRICT
from megakd.data.batch import Pass
from megakd.methods.pools import all_teachers, soft_objective, taught
from megakd.stage import Constant, Stage, StageResult
from megakd.training.lab import Lab


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RoutedConfig(MethodOptions):
    """Every row learns from the teacher that it names, in a column or by its source."""

    learns_from_rollouts: ClassVar[bool] = True
    learns_adapters: ClassVar[bool] = True
    routes_rows: ClassVar[bool] = True

    def problems(self, config: Any) -> Iterator[str]:
        specs = config.teacher_specs
        if len(specs) == 1:
            yield (
                f"teachers: {next(iter(specs))} is the only teacher, and the rows of method "
                f'"{self.name}" name one of several; list further teachers, or set method.name to '
                '"single"'
            )
        for name, spec in specs.items():
            for key in ("finetune", "cache"):
                if getattr(spec, key) is not None:
                    yield (
                        f"{config.key_of(name)}.{key}: reads all training rows, and with method "
                        f'"{self.name}" a teacher reads its own rows; remove the key'
                    )
        if config.task.streaming:
            yield "task.streaming: method routed counts rows before training; remove the key"
        if config.eval.losses:
            yield "eval.losses: only training rows name a teacher; remove the key"
        yield from _unnamed(config)


def _unnamed(config: Any) -> Iterator[str]:
    # What a row lacks that does not name its teacher, in a column or by its source.
    task = config.task
    sources = {f"task.mixture.{k}.teacher": s.teacher for k, s in (task.mixture or {}).items()}
    named = {key: name for key, name in sources.items() if name is not None}
    if task.teacher_column is None:
        unnamed = [key for key in sources if key not in named] if named else ["task.teacher_column"]
        yield from (f"{key}: missing, and every row names its teacher; set it" for key in unnamed)
    elif sources and len(named) == len(sources):
        yield "task.teacher_column: is not read, because every source names its teacher; remove it"
    for key, name in named.items():
        if name not in config.teacher_specs:
            yield no_such_teacher(config, key, name)


def run(config: RoutedConfig, lab: Lab) -> StageResult:
    """Train with one pass per teacher over the micro-batches of its rows."""
    names, rows = all_teachers(lab), lab.facts.rows_of_teachers()
    stage = Stage(
        name="student",
        teachers=names,
        objective=soft_objective(lab),
        strategy=Constant(tuple(Pass(teacher=name) for name in names)),
    )
    total = sum(rows.values())
    shares = {name: rows[name] / total for name in names}
    return taught(lab, stage, weights=shares, how=config.name, rows=rows)
