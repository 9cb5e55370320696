"""report.json, which is written at the end of a run, and the environment in the report."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

from megakd.contract.results import Report
from megakd.engine.memory import device_name
from megakd.storage import atomic

if TYPE_CHECKING:
    from pathlib import Path

    import torch

LIBRARIES = ("megakd", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy")


def write_report(path: Path, report: Report) -> None:
    """Write report.json, whole or not at all."""
    atomic.write_json(path, report)


def environment(
    *, ranks: int, device: torch.device, corpus_content_hash: str | None
) -> dict[str, Any]:
    """Return the conditions of a report's numbers: versions, ranks, device and data."""
    import torch

    return {
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "corpus_content_hash": corpus_content_hash,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
