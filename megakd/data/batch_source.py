"""The source of a stage's training batches: rows on disk, or a stream."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megakd.data.encoding import labelled_only
from megakd.data.loader import StepLoader
from megakd.data.stream_loader import EncodedStream, StreamLoader
from megakd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from megakd.contract.stage import BatchSource
    from megakd.data.encoding import Encoded
    from megakd.data.loader import Collate, OtherReading, StepShape
    from megakd.data.masking import Masking


def batch_source(  # noqa: PLR0913  (each is another fact about the stage)
    encoded: Encoded,
    collate: Collate,
    *,
    shape: StepShape,
    seed: int,
    masking: Masking | None,
    only_labelled: bool,
    max_steps: int | None,
    gather: Callable[[Any], list[Any]],
    others: Mapping[str, OtherReading] = MappingProxyType({}),
) -> BatchSource:
    """Return the batches of a stage.

    Args:
        encoded: the encoded data.
        collate: function that collates a micro-batch.
        shape: rows, micro-batches and ranks of a step.
        seed: seed of the run.
        masking: masks of mlm; None for other tasks.
        only_labelled: whether rows without a label are left out.
        max_steps: the steps of the stage if they do not follow from a number of epochs.
        gather: function that returns the values of all ranks, by rank; a collective.
        others: by role, functions that encode the rows for models with another tokenizer.

    Raises:
        ConfigError: a stream has no number of steps.
        DataError: there are no rows.
    """
    if encoded.stream is None:
        rows = labelled_only(encoded.train) if only_labelled else encoded.train
        return StepLoader(rows, collate, shape=shape, seed=seed, masking=masking, others=others)
    if max_steps is None:
        raise ConfigError(
            "max_steps: missing for a stage that trains on a stream (task.streaming is true); set "
            "max_steps in the section of the stage, such as train.max_steps"
        )
    rows = EncodedStream(encoded.stream, shape=shape, seed=seed)
    return StreamLoader(
        rows,
        collate,
        steps_per_epoch=max_steps,
        gather=gather,
        masking=masking,
    )
