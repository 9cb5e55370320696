"""The end of a process that cannot leave its process group, because other ranks may never join."""

from __future__ import annotations

import os
import sys

_abandoned: list[bool] = []


def abandon_group() -> None:
    """Let `ended` end the process without the destructors of the process group."""
    _abandoned.append(True)


def is_abandoned() -> bool:
    """Return whether this process has abandoned its process group."""
    return bool(_abandoned)


def ended(code: int) -> int:
    """Return the exit code; end the process with the code if the process group is abandoned."""
    if _abandoned:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
