"""The training batches of a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.data.batch_source import batch_source
from megakd.data.loader import StepShape
from megakd.data.mixed_text import MixedText
from megakd.engine.collectives import gather

if TYPE_CHECKING:
    from megakd.config.train import TrainConfig
    from megakd.contract.stage import BatchSource, Stage
    from megakd.engine.distributed import Ranks
    from megakd.training.engines import Assembly


def stage_batches(stage: Stage, assembly: Assembly) -> BatchSource:
    """Return the batches of a stage, for this rank.

    A stage whose models read mixed text uses the rows that are encoded for both vocabularies.

    Args:
        stage: the stage with all options set.
        assembly: the assembly of the run.

    Raises:
        MegakdError: there are no rows, or a stream has no number of steps.
    """
    own = assembly.of(stage.role)
    scorer, encoded = own.scorer(stage.train), own.prepared.encoded
    if stage.mixed:
        encoded = encoded._replace(train=assembly.mixed_rows.rows)
    loader = batch_source(
        encoded,
        scorer.collate,
        shape=step_shape(stage.train, assembly.ranks),
        seed=assembly.config.seed,
        masking=scorer.masking,
        only_labelled=stage.labelled_only,
        max_steps=stage.train.max_steps,
        gather=gather,
        others=_readings(stage, assembly),
    )
    return stage.batches(loader) if stage.batches else loader


def _readings(stage: Stage, assembly: Assembly) -> dict[str, MixedText]:
    pair = assembly.prepared.pair
    if pair is None:
        return {}
    task = assembly.config.task
    return {
        role: MixedText(pair, task, probability=reading.probability)
        for role, reading in stage.mixed.items()
    }


def step_shape(train: TrainConfig, ranks: Ranks) -> StepShape:
    """Return the distribution of a step's rows, for this rank."""
    return StepShape(
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        ranks.rank,
        ranks.world_size,
    )
