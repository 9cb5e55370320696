"""Names of the metrics, files and logged values of the texts that evaluations generate."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = "texts"
"""Folder of the texts that evaluations generate, in the folder of a run."""
MATCH, TEXT_METRIC = "match", "text_"
"""The metric of texts that are compared, and the beginning of the other metrics of texts."""
BY_POSITION = "text"
"""Group of the logged values by position: `text/<first>-<last>/<name>`."""


def file_of_step(folder: Path, step: int) -> Path:
    """Return the file with the texts of one evaluation in the folder of a stage."""
    return folder / f"step-{step:08d}.jsonl"


def is_text_metric(name: str) -> bool:
    """Return whether a metric of an evaluation is about generated texts."""
    return name == MATCH or name.startswith(TEXT_METRIC)
