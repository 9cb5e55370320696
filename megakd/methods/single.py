"""One teacher, one student (Hinton et al. 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from megakd.terms import STRICT

if TYPE_CHECKING:
    from megakd.lab import Lab
    from megakd.stage import StageResult


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SingleConfig:
    """Distil one teacher into the student."""

    name: Literal["single"]


def run(config: SingleConfig, lab: Lab) -> StageResult:
    """Distils on every row, labelled or not; by default half hard and half soft targets."""
    from megakd.stage import Constant, Pass, Stage

    del config
    teacher = lab.teacher()
    return lab.train(
        Stage(
            name="student",
            teachers=(teacher,),
            objective=lab.config.objective or (*lab.hard_terms(0.5), *lab.soft_terms(0.5)),
            strategy=Constant((Pass(teacher=teacher),)),
        )
    )
