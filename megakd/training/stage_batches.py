"""The training batches of a stage, and the features that change them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megakd.contract.batch import BatchSource
from megakd.contract.tasks import STUDENT
from megakd.data.encoding import Encoded, labelled_only
from megakd.data.loader import OtherReading, StepLoader
from megakd.engine.collectives import gather
from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError, ConfigError
from megakd.training.checkpoint import read_states
from megakd.training.stage_extra import StageExtra, StageParts


def extras_of(parts: StageParts) -> list[StageExtra]:
    """Return the features that a stage and the config of its run ask for; a collective."""
    stage, generation = parts.stage, parts.assembly.config.eval.generation
    extras: list[StageExtra] = []
    if stage.rollouts is not None:
        from megakd.training.generated_texts import Rollouts

        extras.append(Rollouts(parts))
    extras.extend(parts.assembly.config.method.extras(parts))
    if generation is not None and stage.role == STUDENT and not stage.views:
        from megakd.training.generated_texts import Texts

        extras.append(Texts(parts, generation))
    return extras


def row_batches(
    parts: StageParts, encoded: Encoded, others: Mapping[str, OtherReading] | None = None
) -> BatchSource:
    """Return a stage's batches of encoded rows, for this rank; `others` as in `data.loader`."""
    stage, layout, seed = parts.stage, parts.layout, parts.assembly.config.seed
    scorer = parts.of_model.scorer(stage.train)
    collate, masking, others = scorer.collate, scorer.masking, others or {}
    if encoded.stream is None:
        rows = labelled_only(encoded.train) if stage.labelled_only else encoded.train
        return StepLoader(rows, collate, layout=layout, seed=seed, masking=masking, others=others)
    from megakd.data.streams import StreamedBlocks, StreamLoader

    # The rules of the config do not see the settings that a method gives to a stage.
    steps = stage.train.max_steps
    if steps is None or layout.tokens_per_rank is not None:
        key = "max_steps is missing" if steps is None else "tokens_per_rank is set"
        raise ConfigError(
            f"{stage.name}: {key} in the settings of the stage, and task.streaming is true: a "
            "stream has no epochs, and its rows are not packed; set max_steps and no "
            "tokens_per_rank, or remove task.streaming"
        )
    blocks = StreamedBlocks(encoded.stream, layout.shape, seed)
    return StreamLoader(blocks, collate, steps_per_epoch=steps, gather=gather, masking=masking)


def check_stream(checkpoint: Path, ranks: Ranks) -> None:
    """Raise if a checkpoint is of a stream that another number of ranks has read."""
    places = read_states(checkpoint, ranks.device)["batches"].get("places")
    if places is not None and len(places) != ranks.world_size:
        raise CheckpointError(
            f"{checkpoint} is of a stream that {len(places)} ranks have read, and this run has "
            f"{ranks.world_size}: a stream goes on only on as many ranks; start {len(places)} "
            "ranks, or set another output_dir"
        )
