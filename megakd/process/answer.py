"""The answer of a command on standard output."""

from __future__ import annotations

import os
import sys


def tell(text: str) -> None:
    """Print a text; end quietly if the program that reads it has ended, as `head` does."""
    try:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again at its end, and would report the same error.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
