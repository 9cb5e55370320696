"""Raw tables of a split: named columns that can be read row by row, several times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from datasets import Dataset

if TYPE_CHECKING:
    from megakd.data.labels import Classes

SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation", "test")
SPLIT_ALIASES: Mapping[str, SplitName] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


class Record(NamedTuple):
    """One row.

    place: place of the row in messages, such as `line 7`.
    values: values by column; a missing value is None.
    """

    place: str
    values: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A split whose text and label columns are not yet chosen.

    name: name of the table in messages.
    columns: names of all columns.
    records: function that reads all rows from the beginning, with constant memory.
    digest: sha256 of the source of the rows.
    class_names: class names by column, if the data itself declares class names.
    """

    name: str
    columns: tuple[str, ...]
    records: Callable[[], Iterator[Record]]
    digest: str
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


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
