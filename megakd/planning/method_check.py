"""Dry run of a method before the first stage, so that it reports errors early."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.config.train import total_steps
from megakd.contract.metrics import Metric
from megakd.losses.stage_losses import stage_losses
from megakd.planning.stages import PlanningLab
from megakd.scoring.evaluation import weighable
from megakd.training.stage_batches import step_shape

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.engine.distributed import Ranks
    from megakd.inputs.inputs import RunInputs


class CheckingLab(PlanningLab):
    """Lab that does not train but knows the data, so that a method's checks work as in a run."""

    def __init__(self, config: RunConfig, prepared: RunInputs, ranks: Ranks) -> None:
        world, device = ranks.world_size, ranks.device.type
        super().__init__(config, prepared.sources, ranks=world, device=device)
        self._prepared, self._ranks = prepared, ranks

    def metric(self, name: str | None) -> Metric:
        """Return a metric of the task that can be weighed against sparsity, as in a real lab."""
        return weighable(name, self._prepared.metric, self._prepared.metrics.names)

    def steps_of_student(self) -> int:
        """Return the number of optimiser steps of `train` if the student trains on all rows."""
        shape = step_shape(self.config.train, self._ranks)
        rows = len(self._prepared.encoded.train)
        return total_steps(self.config.train, shape.steps_per_epoch(rows))


def check_method(config: RunConfig, prepared: RunInputs, ranks: Ranks) -> None:
    """Check the method, its stages and the baselines, so that errors appear now and not later.

    Raises:
        MegakdError: an option does not fit the data or the models, or a loss cannot work between
            the models of a stage.
    """
    for phase in CheckingLab(config, prepared, ranks).play():
        if phase.stage is not None:
            stage_losses(
                phase.stage,
                config.task.type,
                learners=phase.learners,
                teachers=phase.teaching,
                classes=prepared.classes,
            ).check()
