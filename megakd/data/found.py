"""A data set as it was read, before rows are selected and texts are encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset

from megakd.data.labels import Classes
from megakd.data.tables import SplitName

if TYPE_CHECKING:
    from megakd.data.text_stream import TextStream


@dataclass(frozen=True, kw_only=True)
class Found:
    """The rows of a data set before a selection; columns as in `splits.Splits`.

    name: name of the data set in messages.
    classes: classes with which labels are read; None without classes.
    source_hash: sha256 of the sources of the rows.
    stream: the training texts if they are read during training; the training split is then empty.
    """

    name: str
    splits: Mapping[SplitName, Dataset]
    classes: Classes | None
    metrics: tuple[str, ...]
    source_hash: str
    stream: TextStream | None = None

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        return self.classes.names if self.classes else ()
