"""Texts that are read while they are needed: never whole in memory, and without a copy on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from megakd.data.bad_rows import BadRows
from megakd.data.cache import PLACE, key_of
from megakd.data.chat.rows import ChatColumns, conversation_of
from megakd.data.choosing import text_hash
from megakd.data.tables import Record, Table, document_of
from megakd.errors import DataError

ERROR = "__error__"
"""Column of a row that cannot be read, with the reason."""


@dataclass(frozen=True, kw_only=True)
class TextStream:
    """The training texts of a run, in the order of their files.

    name: name of the texts in messages.
    rows: the rows; `datasets` reads the share of each rank and says where a rank is.
    columns: the columns of text; two columns make one document.
    digest: hash of the sources.
    held_out: hashes of the validation texts, or of their prompts, which the stream leaves out.
    chat: the columns of conversations; None for documents. A conversation is a text in JSON.
    bad: what happens to rows that cannot be read.
    """

    name: str
    rows: IterableDataset
    columns: tuple[str, ...]
    digest: str
    held_out: frozenset[int] = frozenset()
    chat: ChatColumns | None = None
    bad: BadRows = field(default_factory=lambda: BadRows(named=1))

    def share(self, rank: int, world: int) -> IterableDataset:
        """Return the rows of one rank, from the beginning.

        If the number of files is a multiple of `world`, a rank reads only its own files. Otherwise
        every rank reads all files and uses one row of each `world` rows.
        """
        return split_dataset_by_node(self.rows, rank=rank, world_size=world)

    def document(self, row: Mapping[str, object]) -> str | None:
        """Return the text of a row; None for a row without text and for a validation text.

        Raises:
            DataError: a value is missing or is not text, unless such rows are left out.
        """
        with self.bad:
            return self._text(Record(str(row.get(PLACE) or "a row"), row))
        return None

    def _text(self, record: Record) -> str | None:
        if ERROR in record.values:
            raise DataError(str(record.values[ERROR]))
        if self.chat is None:
            text = asked = document_of(self.name, self.columns, record)
        else:
            found = conversation_of(self.name, self.chat, record)
            text, asked = (found.to_json(), found.asked) if found else (None, None)
        is_held = self.held_out and asked is not None and text_hash(asked) in self.held_out
        return None if is_held else text

    def documents(self) -> Iterator[str]:
        """Yield the texts of all ranks, from the beginning."""
        for row in self.rows:
            text = self.document(row)
            if text is not None:
                yield text

    def first_rows(self, count: int) -> Table:
        """Return the first rows that have a text, as they are, as a table."""
        return Table(
            name=self.name,
            columns=self.columns,
            records=lambda: (
                Record(f"row {number}", row)
                for number, row in enumerate(
                    islice((row for row in self.rows if self.document(row)), count), start=1
                )
            ),
            digest=key_of(self.digest, count),
        )
