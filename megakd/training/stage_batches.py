"""The training batches of a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.data.mixed_text import MixedText
from megakd.data.routes import RoutedSource
from megakd.data.step_layout import StepLayout, StepShape
from megakd.data.stream_loader import batch_source
from megakd.engine.collectives import gather
from megakd.training.generated_texts import generator_of, with_rollouts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megakd.config.train import TrainConfig
    from megakd.contract.batch import BatchSource
    from megakd.contract.stage import Stage, Teacher
    from megakd.engine.distributed import Ranks
    from megakd.engine.student import StudentEngine
    from megakd.storage.fingerprint import Fingerprint
    from megakd.training.engines import Assembly


def stage_batches(
    stage: Stage,
    assembly: Assembly,
    models: Mapping[str, StudentEngine | Teacher],
    fingerprint: Fingerprint,
) -> BatchSource:
    """Return the batches of a stage, for this rank; a collective.

    A stage whose models read mixed text uses the rows that are encoded for both vocabularies.

    Args:
        stage: the stage with all options set.
        assembly: the assembly of the run.
        models: the engines of the stage, which may generate texts: `student`, and the teachers.
        fingerprint: fingerprint of the stage.

    Raises:
        MegakdError: there are no rows, or a stream has no number of steps.
    """
    layout = step_layout(stage.train, assembly.ranks)
    if stage.rollouts is not None:
        source: BatchSource = with_rollouts(
            stage,
            assembly,
            layout=layout,
            generator=generator_of(stage, assembly, models),
            fingerprint=fingerprint,
        )
    else:
        source = _data_batches(stage, assembly, layout)
    return RoutedSource(source, stage.teachers) if stage.strategy.routes_rows else source


def _data_batches(stage: Stage, assembly: Assembly, layout: StepLayout) -> BatchSource:
    own = assembly.of(stage.role)
    scorer, encoded = own.scorer(stage.train), own.prepared.encoded
    if stage.mixed:
        encoded = encoded._replace(train=assembly.mixed_rows.rows)
    return batch_source(
        encoded,
        scorer.collate,
        layout=layout,
        seed=assembly.config.seed,
        masking=scorer.masking,
        only_labelled=stage.labelled_only,
        max_steps=stage.train.max_steps,
        gather=gather,
        others=_readings(stage, assembly),
    )


def _readings(stage: Stage, assembly: Assembly) -> dict[str, MixedText]:
    pair = assembly.prepared.pair
    if pair is None:
        return {}
    task = assembly.config.task
    return {
        role: MixedText(pair, task, probability=reading.probability)
        for role, reading in stage.mixed.items()
    }


def step_layout(train: TrainConfig, ranks: Ranks) -> StepLayout:
    """Return the distribution of a step's rows over micro-batches, for this rank."""
    return StepLayout(step_shape(train, ranks), train.tokens_per_rank)


def step_shape(train: TrainConfig, ranks: Ranks) -> StepShape:
    """Return the distribution of a step's rows, for this rank."""
    return StepShape(
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        ranks.rank,
        ranks.world_size,
    )
