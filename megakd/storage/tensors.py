"""Files of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_tensors(path: Path, state: Any) -> None:
    """Call `torch.save`, and raise the operating system's own error on failure."""
    try:
        # Into an open file: if torch opens the file itself, it hides the system's error.
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        raise _system_error(error) from error


def _system_error(error: BaseException) -> OSError:
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return OSError(*link.args)
        link = link.__cause__ or link.__context__
    return OSError(str(error).splitlines()[0])
