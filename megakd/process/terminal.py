"""What a command prints, and on which rank."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def print_aside(*, when: bool = True) -> Iterator[None]:
    """Redirect standard output of the body to standard error: Python, C++ and child processes.

    Libraries print to standard output when they are imported or started, and a program that reads
    JSON from standard output cannot tell these prints from the answer.
    """
    if not when:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
            sys.stderr.flush()
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def print_out(text: str) -> None:
    """Print a text; end quietly if the program that reads it has ended, as `head` does."""
    try:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again at its end, and would report the same error.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def aligned_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with the first cells left-aligned and the other cells right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def is_first_of_node() -> bool:
    """Return whether this process is the first rank of its node, which prints errors."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def is_rank_0() -> bool:
    """Return whether this process is the rank that prints, before the process group exists."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
