"""Checks across the fields of a run config that need neither data nor models, by section."""

from __future__ import annotations

from megakd.config.checks.model_rules import model_problems
from megakd.config.checks.task_rules import address_problems, task_problems
from megakd.config.checks.train_rules import objective_problems, rollout_problems, training_problems
from megakd.config.run import RunConfig


def config_problems(config: RunConfig) -> list[str]:
    """Return the problems of a config that no data or model can solve, one line per problem."""
    sections = (
        *(address_problems, model_problems, objective_problems),
        *(task_problems, training_problems, rollout_problems),
    )
    return [problem for section in sections for problem in section(config)]
