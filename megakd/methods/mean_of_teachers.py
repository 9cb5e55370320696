"""Mean of teachers: all teachers of a pool run at every step, and the student learns their mean.

A baseline of SKDBERT. The mean of the cross-entropies with each teacher's soft targets has the same
gradient as the cross-entropy with the mean of the teachers' probabilities. Probabilities are
therefore not averaged.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from megakd.config.options import MethodOptions
from megakd.config.terms import STRICT
from megakd.data.batch import Pass
from megakd.methods.pools import all_teachers, soft_objective, taught
from megakd.stage import Constant, Stage, StageResult
from megakd.training.lab import Lab


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MeanOfTeachersConfig(MethodOptions):
    """Every teacher of the pool runs at every step, and all count alike."""

    learns_adapters: ClassVar[bool] = True


def run(config: MeanOfTeachersConfig, lab: Lab) -> StageResult:
    """Train with one pass per teacher and a single forward of the student per micro-batch."""
    del config
    names = all_teachers(lab)
    share = 1 / len(names)
    stage = Stage(
        name="student",
        teachers=names,
        objective=soft_objective(lab),
        strategy=Constant(tuple(Pass(teacher=name, scale=share) for name in names)),
    )
    return taught(lab, stage, weights=dict.fromkeys(names, share), how="mean")
