"""Packed rows and the documents in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megakd.data.batch import IGNORE
from megakd.data.token_tables import PackedRow


def unpack(rows: Iterable[PackedRow]) -> Iterator[list[int]]:
    """The documents again: the inverse of `pack`, but for empty documents."""
    document: list[int] = []
    for row in rows:
        for token, label in zip(row.input_ids.tolist(), row.labels.tolist(), strict=True):
            document.append(token)
            if label == IGNORE:
                yield document
                document = []
