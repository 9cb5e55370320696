"""The hooks of a feature that only some stages have, and the parts of a stage that it uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megakd.config.train import TrainConfig
from megakd.contract.batch import BatchSource
from megakd.contract.stage import Stage, Teacher
from megakd.data.step_layout import StepLayout, StepShape
from megakd.engine.distributed import Ranks
from megakd.engine.student import StudentEngine
from megakd.training.assembly import Assembly


class StageParts(NamedTuple):
    """Parts that the extras of a stage are made from; `models`: `student`, and frozen teachers."""

    stage: Stage
    assembly: Assembly
    models: Mapping[str, StudentEngine | Teacher]

    @property
    def of_model(self) -> Assembly:
        """The assembly with the tokenizer and the data of the stage's model."""
        return self.assembly.of(self.stage.role)

    @property
    def layout(self) -> StepLayout:
        train, config = self.stage.train, self.assembly.config
        return StepLayout(
            step_shape(train, self.assembly.ranks),
            train.tokens_per_rank,
            self.stage.teachers if config.method.routes_rows else (),
            by_length=config.train.packing is False,
        )

    @property
    def checkpoints(self) -> Path:
        return self.assembly.config.output_dir / "checkpoints" / self.stage.name


class StageExtra:
    """A feature of a stage; every hook may be a collective, and changes nothing here."""

    def source(self) -> BatchSource | None:
        """Return the batches of the stage if they are not simply those of the training rows."""
        return None

    def scores(self, step: int) -> Mapping[str, float]:
        """Return metrics of the student after `step` steps, the same on every rank."""
        del step
        return {}


def step_shape(train: TrainConfig, ranks: Ranks) -> StepShape:
    """Return the distribution of a step's rows, for this rank."""
    return StepShape(
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        ranks.rank,
        ranks.world_size,
    )
