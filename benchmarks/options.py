"""Lists on a command line, separated by commas."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def integers(text: str) -> list[int]:
    """`1,2,3`."""
    return [int(part) for part in text.split(",")]


def fractions(text: str) -> list[float]:
    """`0.5,0.9`."""
    return [float(part) for part in text.split(",")]


def words_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the type of an option that takes some of the known words."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return found

    return read
