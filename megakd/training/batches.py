"""The training batches of a stage: from encoded rows or from a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from megakd.config.sections import TrainConfig
from megakd.data.batch import Batch, BatchSource, Teacher
from megakd.data.encoding import Encoded, labelled_only
from megakd.data.loader import StepLayout, StepLoader, StepShape
from megakd.engine.collectives import gather
from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError, ConfigError
from megakd.stage import Stage
from megakd.training.assembly import Assembly
from megakd.training.checkpoint import read_states
from megakd.training.evaluation import scorer_for
from megakd.training.student import StudentEngine


class StageParts(NamedTuple):
    """Parts that batches are made from; `models`: `student`, and the frozen teachers by name."""

    stage: Stage
    assembly: Assembly
    models: Mapping[str, StudentEngine | Teacher]

    @property
    def of_model(self) -> Assembly:
        """The assembly with the tokenizer and the data of the stage's model."""
        return self.assembly.for_role(self.stage.role)

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


def step_shape(train: TrainConfig, ranks: Ranks) -> StepShape:
    """Return the distribution of a step's rows, for this rank."""
    return StepShape(
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        ranks.rank,
        ranks.world_size,
    )


def row_batches(
    parts: StageParts, encoded: Encoded, others: Mapping[str, Callable[..., Batch]] | None = None
) -> BatchSource:
    """Return a stage's batches of encoded rows, for this rank; `others` as in `data.loader`."""
    stage, layout, seed = parts.stage, parts.layout, parts.assembly.config.seed
    scorer = scorer_for(parts.of_model, stage.train)
    collate, masking, others = scorer.collate, scorer.masking, others or {}
    if encoded.stream is None:
        rows = labelled_only(encoded.train) if stage.labelled_only else encoded.train
        return StepLoader(rows, collate, layout=layout, seed=seed, masking=masking, others=others)
    from megakd.data.streams import StreamedShare, StreamLoader

    # The rules of the config do not see the settings that a method gives to a stage.
    steps = stage.train.max_steps
    if steps is None or layout.tokens_per_rank is not None:
        key = "max_steps is missing" if steps is None else "tokens_per_rank is set"
        raise ConfigError(
            f"{stage.name}: {key} in the settings of the stage, and task.streaming is true: a "
            "stream has no epochs, and its rows are not packed; set max_steps and no "
            "tokens_per_rank, or remove task.streaming"
        )
    share = StreamedShare(encoded.stream, layout.shape, seed)
    return StreamLoader(share, collate, steps_per_epoch=steps, gather=gather, masking=masking)


def check_stream(checkpoint: Path, ranks: Ranks) -> None:
    """Raise if a checkpoint is of a stream that another number of ranks has read."""
    places = read_states(checkpoint, ranks.device)["batches"].get("places")
    if places is not None and len(places) != ranks.world_size:
        raise CheckpointError(
            f"{checkpoint} is of a stream that {len(places)} ranks have read, and this run has "
            f"{ranks.world_size}: a stream goes on only on as many ranks; start {len(places)} "
            "ranks, or set another output_dir"
        )
