"""One teacher, one student (Hinton et al. 2015)."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from megakd.config.options import OneTeacherOptions
from megakd.config.task import SOFT_LABELS
from megakd.config.terms import STRICT
from megakd.data.batch import Pass
from megakd.stage import Constant, Stage, StageResult
from megakd.training.lab import Lab


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SingleConfig(OneTeacherOptions):
    """Distil one teacher into the student."""

    learns_from_rollouts: ClassVar[bool] = True
    learns_adapters: ClassVar[bool] = True
    reads_soft_labels: ClassVar[bool] = True


def run(config: SingleConfig, lab: Lab) -> StageResult:
    """Distil on all rows; by default with half hard, half soft targets, on generated texts soft."""
    is_given = lab.config.task.soft_labels is not None
    teacher = SOFT_LABELS if is_given else lab.teacher(config.teacher)
    default = (*lab.hard_terms(0.5), *lab.soft_terms(0.5))
    if lab.config.rollout is not None:
        default = lab.soft_terms()
    return lab.train(
        Stage(
            name="student",
            teachers=(teacher,),
            objective=lab.config.objective or default,
            strategy=Constant((Pass(teacher=teacher),)),
        )
    )
