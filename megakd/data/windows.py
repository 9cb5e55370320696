"""Texts of any length for encoders: one window of a text per row, nothing lost.

Rows hold one text each and are padded, for an encoder's attention has no document boundaries
that several texts in a row would need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def windows(ids: Sequence[int], room: int) -> Iterator[Sequence[int]]:
    """Cuts a text into as few windows as there can be, all as long as each other, give or take 1.

    A short rest would leave its masked tokens without context.

    Args:
        ids: the tokens of a text; none at all make no window.
        room: tokens that fit into a window.
    """
    if room < 1:
        raise ValueError(f"a window has at least 1 token, got room {room}")
    count = -(-len(ids) // room)
    for number in range(count):
        yield ids[number * len(ids) // count : (number + 1) * len(ids) // count]
