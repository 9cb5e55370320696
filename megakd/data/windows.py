"""Windows of long texts for encoders: one window of a text per row, without losing a token.

A row holds tokens of only one text and is padded, because an encoder's attention does not separate
several documents in a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def windows(ids: Sequence[int], room: int) -> Iterator[Sequence[int]]:
    """Cut a text into as few windows as possible, whose lengths differ by at most 1.

    A short last window would leave its masked tokens without context.

    Args:
        ids: the tokens of a text; an empty text has no windows.
        room: maximum number of tokens in a window.
    """
    if room < 1:
        raise ValueError(f"a window has at least 1 token, got room {room}")
    count = -(-len(ids) // room)
    for number in range(count):
        yield ids[number * len(ids) // count : (number + 1) * len(ids) // count]
