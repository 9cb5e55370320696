"""Plain text as documents of a language model.

A file is one document, handed on in pieces of whole paragraphs of about 8000 characters: longer
than most contexts, and small enough that a held-out split can be cut from a single book.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megakd.data.readers import digest_of, readable, text_lines
from megakd.data.tables import Record, Table

PIECE_CHARACTERS = 8000
# A file that must give its own held-out split is cut into at least about this many pieces.
FEWEST_PIECES = 40


def read_documents(paths: Sequence[Path], name: str, *, to_be_split: bool) -> Table:
    """The texts of files as rows.

    Args:
        paths: the files, one document each.
        name: what messages call them.
        to_be_split: cut small files finer, so that a held-out split can be taken from them.
    """
    size = 0
    for path in paths:
        with readable(path):
            size += path.stat().st_size
    length = min(PIECE_CHARACTERS, size // FEWEST_PIECES) if to_be_split else PIECE_CHARACTERS

    def records() -> Iterator[Record]:
        for path in paths:
            for number, piece in pieces(text_lines(path), length):
                yield Record(f"{path.name} line {number}", {"text": piece})

    return Table(
        name=name,
        columns=("text",),
        records=records,
        digest=":".join([*(digest_of(path) for path in paths), str(length)]),
    )


def pieces(lines: Iterator[str], length: int) -> Iterator[tuple[int, str]]:
    """Cuts lines into pieces of at least `length` characters: (first line, text).

    A piece ends at a blank line, or at the end of a line once it is twice as long.
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
