"""Options of the benchmarks: parsers, and lists that are separated by commas."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from lib.launching import ROOT, UnusableError


def parser_of(about: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)


def parsed(
    parser: argparse.ArgumentParser, module: str, arguments: Sequence[str]
) -> argparse.Namespace:
    """Return the options, with the words of the command; folders are those of the repository."""
    given = parser.parse_intermixed_args(arguments)
    given.arguments, given.command = list(arguments), command_of(module, arguments)
    if getattr(given, "data", None) is not None:
        given.data = given.data.resolve()
    if getattr(given, "out", None) is not None:
        given.out = ROOT / given.out
    return given


def add_runs(parser: argparse.ArgumentParser, out: str, *, jobs: int = 2, data: str) -> None:
    """Add the options of a benchmark that trains models with several seeds.

    jobs: the default of `--jobs`. data: what the data folder holds.
    """
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3], help="separated by commas")
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / out)
    words = f"runs of one rank side by side; default: {jobs}"
    parser.add_argument("--jobs", type=positive, default=jobs, help=words)
    parser.add_argument("--data", type=Path, required=True, help=f"holds {data}")


def command_of(module: str, arguments: Sequence[str]) -> str:
    return shlex.join(["python", "benchmarks", module.removesuffix(".__main__"), *arguments])


def need(paths: Iterable[Path]) -> None:
    for path in paths:
        if not path.exists():
            raise UnusableError(f"{path} does not exist")


def positive(text: str) -> int:
    """`2`; an integer above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer above zero")
    return int(text)


def integers(text: str) -> list[int]:
    """`1,2,3`, each integer once."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 1,2,3") from None
    _check_once(numbers, text)
    return numbers


def fractions(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def words_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        _check_once(words, text)
        return words

    return read


def _check_once(values: Collection[object], text: str) -> None:
    if len({*values}) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} names something twice")
