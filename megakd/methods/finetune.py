"""Supervised training without a teacher; also what `teacher.finetune` and `alone` run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from megakd.contract.terms import STRICT

if TYPE_CHECKING:
    from megakd.contract.lab import Lab
    from megakd.contract.stage import StageResult


@dataclass(config=STRICT, frozen=True, kw_only=True)
class FinetuneConfig:
    """Train the student on the labels alone."""

    name: Literal["finetune"]


def run(config: FinetuneConfig, lab: Lab) -> StageResult:
    """Trains the student on the rows that carry a label."""
    from megakd.contract.stage import Stage

    del config
    objective = lab.config.objective or lab.hard_terms()
    return lab.train(Stage(name="student", objective=objective, labelled_only=True))
