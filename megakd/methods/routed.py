"""Routed teachers: every training row names the teacher that it learns from.

For one student and one expert per domain. The loss of a row is the row's loss with its own teacher,
and a step divides the sum over the rows of all teachers by the counts of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from megakd.contract.lab import Lab
from megakd.contract.options import MethodOptions
from megakd.contract.stage import Constant, Pass, Stage, StageResult
from megakd.contract.terms import STRICT
from megakd.methods.pools import all_teachers, soft_objective, taught


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RoutedConfig(MethodOptions):
    """Every row learns from the teacher that it names, in a column or by its source."""

    learns_from_rollouts: ClassVar[bool] = True
    learns_adapters: ClassVar[bool] = True
    routes_rows: ClassVar[bool] = True
    name: Literal["routed"]

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


def run(config: RoutedConfig, lab: Lab) -> StageResult:
    """Train with one pass per teacher over the micro-batches of its rows."""
    names, rows = all_teachers(lab), lab.rows_of_teachers()
    stage = Stage(
        name="student",
        teachers=names,
        objective=soft_objective(lab),
        strategy=Constant(tuple(Pass(teacher=name) for name in names)),
        rollouts=lab.config.rollout,
    )
    total = sum(rows.values())
    shares = {name: rows[name] / total for name in names}
    return taught(lab, stage, weights=shares, how=config.name, rows=rows)
