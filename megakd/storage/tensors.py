"""Files of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megakd.storage.atomic import chain_of


def write_tensors(path: Path, state: Any) -> None:
    """Call `torch.save`, and raise the operating system's own error on failure."""
    try:
        # Into an open file: if torch opens the file itself, it hides the system's error.
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        system = (link.args for link in chain_of(error) if isinstance(link, OSError))
        raise OSError(*next(system, (str(error).splitlines()[0],))) from error
