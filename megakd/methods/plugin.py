"""What a method of another package is made of: options derived from here, and `run` beside them."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from megakd.contract.plugins import wrong_options
from megakd.contract.terms import STRICT


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PluginMethod:
    """Options of a method of another package; its file has `run(config, lab)` too.

    needs_teacher: whether a run without a teacher is refused.
    """

    needs_teacher: ClassVar[bool] = True
    name: str

    def problems(self, config: Any) -> list[str]:
        """Return what the whole `RunConfig` has that the method cannot work with, line by line."""
        del config
        return []


def wrong_method(kind: Any) -> str | None:
    """Return why a class cannot be the options of a method; None if it can."""
    wrong = wrong_options(kind, PluginMethod, ())
    if wrong is None and not callable(getattr(sys.modules[kind.__module__], "run", None)):
        return f"{kind.__module__}, the file of {kind.__name__}, has no function run(config, lab)"
    return wrong
