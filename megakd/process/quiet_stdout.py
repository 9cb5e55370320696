"""Keeps standard output for what a command answers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def print_aside(*, when: bool = True) -> Iterator[None]:
    """Send to standard error what anybody prints inside: Python, C++ or a process that is started.

    Libraries print to standard output when they are imported or start, and a program that reads
    JSON from there cannot tell that from the answer.

    Args:
        when: whether to do so.
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
