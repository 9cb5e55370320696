"""What the methods with several teachers have in common: their losses and what is reported."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from megakd.contract.stage import Constant, Pass, Stage, teacher_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megakd.contract.lab import Lab
    from megakd.contract.stage import StageResult
    from megakd.contract.terms import TermConfig


def soft_objective(lab: Lab) -> tuple[TermConfig, ...]:
    """The config's, else soft targets alone: teachers of any shape can give those."""
    return lab.config.objective or lab.soft_terms()


def taught_by_all(
    lab: Lab, names: tuple[str, ...], objective: tuple[TermConfig, ...], *, share: float, how: str
) -> StageResult:
    """Trains the student on all teachers at every step, over one forward of its own.

    Args:
        lab: of the run.
        names: of the teachers.
        objective: of every teacher's pass.
        share: what each pass counts.
        how: what the shares are called in the report.
    """
    stage = Stage(
        name="student",
        teachers=names,
        objective=objective,
        strategy=Constant(tuple(Pass(teacher=name, scale=share) for name in names)),
    )
    return taught(lab, stage, weights=dict.fromkeys(names, share), how=how)


def taught(lab: Lab, stage: Stage, *, weights: Mapping[str, float], how: str) -> StageResult:
    """Trains the student, and notes how often each teacher of the pool was asked.

    Args:
        lab: of the run.
        stage: the student's.
        weights: of the teachers by name: probabilities, or shares of the loss.
        how: what the weights are called in the report.
    """
    result = lab.train(stage)
    asked = Counter[str]()
    for step in range(result.steps):
        asked.update(teacher_names(stage.strategy.passes(step)))
    lab.record.pool = {
        "distribution": how,
        "teachers": [
            {
                "name": name,
                "weight": weight,
                "steps": asked[name],
                "score": lab.record.dev_scores.get(name),
            }
            for name, weight in weights.items()
        ],
    }
    return result
