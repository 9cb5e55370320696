"""The results of `megakd evaluate` as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.reports.table import aligned_rows


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


def task_scores_text(found: Mapping[str, Any]) -> str:
    """Return the result of `evaluate_tasks` as lines of text."""
    rows = [["task", "metric", "filter", "value", "stderr", "shots", "rows"]]
    for entry in found["results"]:
        arrow = {True: " \N{UPWARDS ARROW}", False: " \N{DOWNWARDS ARROW}"}
        metric = entry["metric"] + arrow.get(entry["higher_is_better"], "")
        numbers = (_cell(entry[key], ".4f") for key in ("value", "stderr"))
        counts = (_cell(entry[key], ",") for key in ("shots", "rows"))
        rows.append([entry["task"], metric, entry["filter"], *numbers, *counts])
    limit = "" if found["limit"] is None else f", the first {found['limit']} rows of each task"
    title = f"{found['model']}, lm-eval {found['lm_eval']}{limit}"
    return "\n".join([title, "", *aligned_rows(rows)])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
