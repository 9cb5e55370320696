"""Plain text files as documents of a language model.

Each file is read in pieces of whole paragraphs with about 8000 characters. A piece is longer than
most contexts, and small enough that a held-out split can be cut from a single book.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megakd.data.readers import digest_of, readable, text_lines
from megakd.data.tables import Record, Table

PIECE_CHARACTERS = 8000
# A file whose held-out split is cut from its own text is cut into about this many pieces or more.
FEWEST_PIECES = 40


def read_documents(paths: Sequence[Path], name: str, *, to_be_split: bool) -> Table:
    """Return the texts of files as rows of a table.

    Args:
        paths: the files.
        name: name of the files in messages.
        to_be_split: whether a held-out split will be cut from the files, so that small files need
            shorter pieces.
    """
    size = 0
    for path in paths:
        with readable(path):
            size += path.stat().st_size
    length = min(PIECE_CHARACTERS, size // FEWEST_PIECES) if to_be_split else PIECE_CHARACTERS

    return Table(
        name=name,
        columns=("text",),
        records=partial(documents_of, paths, length),
        digest=":".join([*(digest_of(path) for path in paths), str(length)]),
    )


def documents_of(paths: Sequence[Path], length: int = PIECE_CHARACTERS) -> Iterator[Record]:
    """Yield the pieces of files, see `pieces`."""
    for path in paths:
        for number, piece in pieces(text_lines(path), length):
            yield Record(f"{path.name} line {number}", {"text": piece})


def pieces(lines: Iterator[str], length: int) -> Iterator[tuple[int, str]]:
    """Cut lines into pieces of at least `length` characters.

    A piece ends at the first blank line after `length` characters, or at the first end of a line
    after twice as many characters.

    Yields:
        Number of the first line, and text of the piece.
    """
    held: list[str] = []
    characters, first = 0, 1
    for number, line in enumerate(lines, start=1):
        held.append(line)
        characters += len(line)
        ends_paragraph = not line.strip()
        if characters >= (length if ends_paragraph else 2 * length):
            yield from _piece(first, held)
            held, characters, first = [], 0, number + 1
    yield from _piece(first, held)


def _piece(first: int, lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    text = "".join(lines).strip("\r\n")
    if text.strip():
        yield first, text
