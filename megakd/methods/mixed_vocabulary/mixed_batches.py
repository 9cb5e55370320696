"""The batches of a stage with models that read mixed text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from megakd.methods.mixed_vocabulary.mixed_text import MixedText
from megakd.training.stage_batches import row_batches
from megakd.training.stage_extra import StageExtra, StageParts

if TYPE_CHECKING:
    from megakd.contract.batch import BatchSource


class BothVocabularies(StageExtra):
    """The rows that are encoded for both vocabularies, for models that read mixed text."""

    def __init__(self, parts: StageParts) -> None:
        self._parts = parts

    @override
    def source(self) -> BatchSource:
        stage, assembly = self._parts.stage, self._parts.assembly
        pair, task = assembly.prepared.pair, assembly.config.task
        encoded = self._parts.own.prepared.encoded._replace(train=assembly.method_rows.rows)
        others = {
            role: MixedText(pair, task, probability=reading.probability)
            for role, reading in stage.mixed.items()
            if pair is not None
        }
        return row_batches(self._parts, encoded, others)
