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

    from megakd.contract.batch import BatchSource
    from megakd.data.encoding import Encoded
    from megakd.data.loader import OtherReading
    from megakd.data.masking import Masking
    from megakd.data.step_layout import Collate, StepLayout


def batch_source(  # noqa: PLR0913  (each is another fact about the stage)
    encoded: Encoded,
    collate: Collate,
    *,
    layout: StepLayout,
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
        layout: rows, micro-batches and ranks of a step.
        seed: seed of the run.
        masking: masks of mlm; None for other tasks.
        only_labelled: whether rows without a label are left out.
        max_steps: the steps of the stage if they do not follow from a number of epochs.
        gather: function that returns the values of all ranks, by rank; a collective.
        others: by role, functions that encode the rows for models with another tokenizer.

    Raises:
        ConfigError: a stream has no number of steps, or its rows are to be packed by tokens.
        DataError: there are no rows.
    """
    if encoded.stream is None:
        rows = labelled_only(encoded.train) if only_labelled else encoded.train
        return StepLoader(rows, collate, layout=layout, seed=seed, masking=masking, others=others)
    if max_steps is None:
        raise ConfigError(
            "max_steps: missing for a stage that trains on a stream (task.streaming is true); set "
            "max_steps in the section of the stage, such as train.max_steps"
        )
    if layout.tokens_per_rank is not None:
        raise ConfigError(
            f"train.tokens_per_rank: {layout.tokens_per_rank} packs the rows of all ranks "
            "together, and with a stream every rank reads rows of its own (task.streaming is "
            "true); remove one of the two"
        )
    rows = EncodedStream(encoded.stream, shape=layout.shape, seed=seed)
    return StreamLoader(
        rows,
        collate,
        steps_per_epoch=max_steps,
        gather=gather,
        masking=masking,
    )
