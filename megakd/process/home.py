"""Paths that a user writes with ~ for the home folder."""

from __future__ import annotations

import os
from pathlib import Path


def in_home(text: str) -> Path:
    """Return a path with ~ or ~name at its beginning replaced by the home folder of the user.

    Shells leave `--to=~/folder` unchanged. A name that is no user stays as written.
    """
    return Path(os.path.expanduser(text))  # noqa: PTH111, Path.expanduser raises RuntimeError
