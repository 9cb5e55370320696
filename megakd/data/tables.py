"""One split as it was found: named columns, read row by row, as often as wanted."""

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
    """One row. place: where messages say it is, such as `line 7`; a missing value is None."""

    place: str
    values: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A split before it is known which column is what.

    name: what messages call it.
    columns: all that occur.
    records: reads the rows once more from the beginning; memory stays flat.
    digest: sha256 of what the rows are read from.
    class_names: by column, where the data itself names its classes.
    """

    name: str
    columns: tuple[str, ...]
    records: Callable[[], Iterator[Record]]
    digest: str
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The rows of a data set before any are chosen; columns as in `splits.Splits`.

    name: what messages call the data set.
    classes: how labels are read; None without classes.
    source_hash: sha256 of what the rows came from.
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
