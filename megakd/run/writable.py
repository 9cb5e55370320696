"""The check that a folder can be written to, before anything is computed for it."""

from __future__ import annotations

import os
from pathlib import Path

from megakd.errors import ConfigError


def check_writable(folder: Path, *, where: str) -> None:
    """Check that a folder can be written to, or can be created.

    Args:
        folder: the folder.
        where: the option that names the folder, for the message.

    Raises:
        ConfigError: the folder, or the nearest folder above it that exists, is not writable.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(f"{where}: {there} is not a writable folder")
