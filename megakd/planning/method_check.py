"""Plays a method through before the first stage, so that whatever it refuses is found then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.config.schedules import total_steps
from megakd.contract.metrics import Metric
from megakd.losses.stage_losses import stage_losses
from megakd.methods import run_method
from megakd.planning.stages import PlanningLab
from megakd.training.evaluation import weighable
from megakd.training.recipes import baseline_stage
from megakd.training.stage_run import step_shape

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.engine.distributed import Ranks
    from megakd.training.inputs import RunInputs


class CheckingLab(PlanningLab):
    """A lab that trains nothing and knows the data: every check of a method works as in a run."""

    def __init__(self, config: RunConfig, prepared: RunInputs, ranks: Ranks) -> None:
        super().__init__(config, prepared.sources)
        self._prepared, self._ranks = prepared, ranks

    def metric(self, name: str | None) -> Metric:
        """A metric of the task that can be weighed against sparsity, as of the lab."""
        return weighable(name, self._prepared.metric, self._prepared.metrics.names)

    def steps_of_student(self) -> int:
        """Optimiser steps that `train` asks for where all rows are trained on."""
        shape = step_shape(self.config.train, self._ranks)
        rows = len(self._prepared.encoded.train)
        return total_steps(self.config.train, shape.steps_per_epoch(rows))


def check_method(config: RunConfig, prepared: RunInputs, ranks: Ranks) -> None:
    """Refuse what the method, its stages and the baselines would refuse later.

    Raises:
        MegakdError: an option does not fit the data or the models, or a loss cannot work between
            the models of a stage.
    """
    lab = CheckingLab(config, prepared, ranks)
    student = run_method(config.method, lab)  # type: ignore[arg-type]
    for name in config.baselines:
        lab.train(baseline_stage(lab, name, student))  # type: ignore[arg-type]
    for phase in lab.phases:
        if phase.stage is not None:
            stage_losses(
                phase.stage,
                config.task.type,
                learners=phase.learners,
                teachers=[ready.source for ready in phase.teachers.values()],
                classes=prepared.classes,
            ).check()
