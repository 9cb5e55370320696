"""The results of `megakd evaluate` as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scores_text(found: Mapping[str, Any]) -> str:
    """Return the result of `evaluate_model` as lines of text."""
    parts = [
        f"{found['file']}, {found['split']}: {found['rows']} rows",
        _metric_lines(found["metrics"]),
    ]
    for name, entry in found["evaluation_sets"].items():
        parts += [
            "",
            f"{name} ({entry['file']}): {entry['rows']} rows",
            _metric_lines(entry["metrics"]),
        ]
    return "\n".join(parts)


def _metric_lines(metrics: Mapping[str, float]) -> str:
    width = max((len(name) for name in metrics), default=0)
    return "\n".join(f"{name:{width}}  {value:.4f}" for name, value in metrics.items())
