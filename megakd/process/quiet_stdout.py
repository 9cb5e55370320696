"""Redirection of prints, so that standard output has only the answer of a command."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def print_aside(*, when: bool = True) -> Iterator[None]:
    """Redirect standard output of the body to standard error: Python, C++ and child processes.

    Libraries print to standard output when they are imported or started, and a program that reads
    JSON from standard output cannot tell these prints from the answer.

    Args:
        when: whether to redirect.
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
