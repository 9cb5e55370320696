"""Paths of a run config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        user = path.parts[0]
        raise ValueError(
            f"{user} is the home folder of a user that does not exist (got {str(path)!r}); "
            "give the whole path"
        ) from None


Folder = Annotated[Path, AfterValidator(_expanded)]
"""A path in which `~` is the home folder."""
Checkpoint = Annotated[str, AfterValidator(lambda text: str(_expanded(Path(text))))]
