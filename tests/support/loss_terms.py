"""Loss terms by the names that a config gives them."""

from __future__ import annotations

from typing import Any

from megakd.config import terms


def term_of(loss: str, **options: Any) -> Any:
    kind = getattr(terms, loss.title().replace("_", ""))
    return kind(loss=loss, **options)
