"""Types of options: lists that are separated by commas, and counts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable


def positive(text: str) -> int:
    """`2`; an integer above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer above zero")
    return int(text)


def integers(text: str) -> list[int]:
    """`1,2,3`, each integer once."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 1,2,3") from None
    _check_once(found, text)
    return found


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
        _check_once(found, text)
        return found

    return read


def _check_once(found: Collection[object], text: str) -> None:
    if len({*found}) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names something twice")
