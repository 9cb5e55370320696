"""Distil Hugging Face teachers into smaller students under DeepSpeed."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# An editable install finds the package by a link; files have their own names in tracebacks.
__path__ = [os.path.realpath(folder) for folder in __path__]

if TYPE_CHECKING:
    from megakd.api import RunResult, distil, evaluate, load_config, plan, shrink, train
    from megakd.config.run import RunConfig
    from megakd.errors import MegakdError

__all__ = [
    "MegakdError",
    "RunConfig",
    "RunResult",
    "distil",
    "evaluate",
    "load_config",
    "plan",
    "shrink",
    "train",
]
_HOMES = {
    "MegakdError": "megakd.errors",
    "RunConfig": "megakd.config.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import megakd` costs nothing."""
    if name == "__version__":
        return version("megakd")
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "megakd.api")), name)
    raise AttributeError(f"module megakd has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
