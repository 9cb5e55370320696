"""Packing of documents of any length into rows of [length] tokens, without losing a token.

Documents are concatenated; a document that does not fit into a row continues in the next row.
Positions restart at 0 at the start of every document and of every row. Decoders of transformers
read the restarts as document boundaries and prevent attention to other documents. This requires
that no attention mask and no cache is given (`use_cache=False`): with a cache, decoders ignore the
restarts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megakd.contract.batch import IGNORE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import ArrayLike, NDArray


class PackedRow(NamedTuple):
    """One row, int32; the last row of a data set is shorter than the others.

    input_ids: [T] tokens.
    position_ids: [T] counted from the start of the document, or of the row if later.
    labels: [T] the next token of the same document, even if the next token is in the next row;
        -100 at the end of a document. Every token except the first of a document is a target
        exactly once.
    """

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


class Packer:
    """Rows under construction; a document that does not fit continues in the next row.

    Args:
        length: tokens of a row, at least 1.
        begun: an unfinished row, see `rest`.
    """

    def __init__(self, length: int, begun: PackedRow | None = None) -> None:
        if length < 1:
            raise ValueError(f"a packed row has at least 1 token, got length {length}")
        self._tokens = np.empty((3, length), dtype=np.int32)
        self._used = 0
        if begun is not None:
            self._used = len(begun.input_ids)
            self._tokens[:, : self._used] = np.stack(begun)

    def add(self, document: ArrayLike) -> Iterator[PackedRow]:
        """Add the tokens of a document, and yield the rows that are full."""
        ids = np.asarray(document, dtype=np.int32)
        labels = np.append(ids[1:], np.int32(IGNORE))
        start = 0
        while start < len(ids):
            start += self._put(ids[start:], labels[start:])
            if self._used == self._tokens.shape[1]:
                yield self._row()
                self._used = 0

    def rest(self) -> PackedRow | None:
        """Return the unfinished row; None if it has no token."""
        return self._row() if self._used else None

    def _put(self, ids: NDArray[np.int32], labels: NDArray[np.int32]) -> int:
        count = min(len(ids), self._tokens.shape[1] - self._used)
        end = self._used + count
        self._tokens[0, self._used : end] = ids[:count]
        self._tokens[1, self._used : end] = np.arange(count)
        self._tokens[2, self._used : end] = labels[:count]
        self._used = end
        return count

    def _row(self) -> PackedRow:
        row = self._tokens[:, : self._used].copy()
        return PackedRow(row[0], row[1], row[2])


def pack(documents: Iterable[ArrayLike], length: int) -> Iterator[PackedRow]:
    """Pack documents in their order.

    Args:
        documents: token numbers of each document; empty documents are ignored.
        length: tokens of a row, at least 1.

    Yields:
        Full rows, then a shorter row with the remaining tokens.
    """
    packer = Packer(length)
    for document in documents:
        yield from packer.add(document)
    rest = packer.rest()
    if rest is not None:
        yield rest
