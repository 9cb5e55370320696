"""Supervised training without a teacher; `teacher.finetune` and `alone` train in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from megakd.config.options import MethodOptions
from megakd.config.terms import STRICT
from megakd.stage import Stage, StageResult
from megakd.training.lab import Lab


@dataclass(config=STRICT, frozen=True, kw_only=True)
class FinetuneConfig(MethodOptions):
    """Train the student on the labels alone."""

    needs_teacher: ClassVar[bool] = False
    learns_adapters: ClassVar[bool] = True

    def problems(self, config: Any) -> Iterator[str]:
        for key in ("teacher", "teachers"):
            if getattr(config, key):
                yield (
                    f'{key}: method "finetune" learns only from the labels and does not use a '
                    f'teacher; remove the section ({key}=null), or set method.name to "single"'
                )


def run(config: FinetuneConfig, lab: Lab) -> StageResult:
    """Train the student on the rows that carry a label."""
    del config
    objective = lab.config.objective or lab.hard_terms()
    return lab.train(Stage(name="student", objective=objective))
