"""Data that a benchmark reads and does not make."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def is_incomplete(program: str, paths: Iterable[Path]) -> bool:
    """Return whether a path does not exist, and print the error of the first one."""
    missing = [path for path in paths if not path.exists()]
    if missing:
        print(f"{program}: error: {missing[0]} does not exist", file=sys.stderr)
    return bool(missing)
