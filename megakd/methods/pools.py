"""Common parts of the methods with several teachers: losses and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from megakd.config.terms import TermConfig
from megakd.data.batch import teacher_names
from megakd.stage import Stage, StageResult
from megakd.training.lab import Lab


def soft_objective(lab: Lab) -> tuple[TermConfig, ...]:
    """Return the config's objective, or else only soft targets, which any teacher can give."""
    return lab.config.objective or lab.soft_terms()


def all_teachers(lab: Lab) -> tuple[str, ...]:
    """Return the names of all teachers; fine-tune each teacher first if the config asks for it."""
    return tuple(map(lab.teacher, lab.config.teacher_specs))


def taught(
    lab: Lab,
    stage: Stage,
    *,
    weights: Mapping[str, float],
    how: str,
    rows: Mapping[str, int] | None = None,
) -> StageResult:
    """Train the student, and report in how many steps each teacher of the pool ran.

    Args:
        weights: weights of the teachers by name: probabilities, or shares of the loss.
        rows: number of training rows of each teacher; None if every row may learn from any teacher.
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
                "rows": None if rows is None else rows[name],
                "score": lab.record.dev_scores.get(name),
            }
            for name, weight in weights.items()
        ],
    }
    return result
