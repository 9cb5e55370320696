"""A data set as it was read, before rows are selected and texts are encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from datasets import Dataset

from megakd.data.labels import Classes
from megakd.data.tables import SplitName


@dataclass(frozen=True, kw_only=True)
class Found:
    """The rows of a data set before a selection; columns as in `splits.Splits`.

    name: name of the data set in messages.
    classes: classes with which labels are read; None without classes.
    source_hash: sha256 of the sources of the rows.
    """

    name: str
    splits: Mapping[SplitName, Dataset]
    classes: Classes | None
    metrics: tuple[str, ...]
    source_hash: str

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        return self.classes.names if self.classes else ()
