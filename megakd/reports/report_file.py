"""The files that a report is read from: report.json, one flat mapping, and metrics.jsonl."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megakd.contract.results import Report
from megakd.contract.tasks import STUDENT
from megakd.errors import CheckpointError
from megakd.process import atomic
from megakd.reports.table import is_number

if TYPE_CHECKING:
    import torch

LIBRARIES = ("megakd", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy")
GRAPH = f"{STUDENT}_onnx"
"""The student's graph among the models of the report, if it is written."""
REQUIRED = ("method", "task", "metric_name", "metrics", "models", "student.parameters", "stages")
"""Some keys of every report; reports of earlier versions lack the last ones."""


def write_report(path: Path, report: Report) -> None:
    """Write report.json, whole or not at all."""
    atomic.write_json(path, report)


def read_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        CheckpointError: the file is missing, damaged, or no report of this version.
    """
    again = f"remove {path} and start the command of the run again, which reuses finished stages"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} does not exist: megakd writes the file when the run is complete; start the "
            "command of the run again to continue the run"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}); {again}") from error
    report = cast("Report", content) if isinstance(content, dict) else {}
    missing = [key for key in REQUIRED if key not in report]
    if missing:
        raise CheckpointError(
            f"{path} is not a report of this version of megakd: {', '.join(missing)} missing; "
            f"{again}"
        )
    return report


@functools.cache
def installed_versions() -> Mapping[str, str]:
    """Return the versions of megakd and of what its numbers depend on."""
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def environment(
    *, ranks: int, device: torch.device, corpus_content_hash: str | None
) -> dict[str, Any]:
    """Return the conditions of a report's numbers: versions, ranks, device and data."""
    import torch

    from megakd.engine.memory import device_name

    versions = {f"versions.{name}": version for name, version in installed_versions().items()}
    return {
        "environment.python": platform.python_version(),
        "environment.platform": platform.platform(),
        "environment.device": device_name(device),
        "environment.cores": os.cpu_count(),
        "environment.threads": torch.get_num_threads(),
        "environment.ranks": ranks,
        "environment.corpus_content_hash": corpus_content_hash,
        **versions,
    }


Points = list[tuple[int, float]]
Curves = dict[str, dict[str, Points]]
"""(step, value) with rising steps and finite values, by stage and key, such as `train/loss`."""
LAST_STEP = 2**53
"""A record with a larger step is damaged: an axis could not tell the step from the next."""


def read_history(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the records of metrics.jsonl in order; none if the file does not exist.

    Truncated lines of a killed run and damaged lines are skipped.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            # An integer of too many digits and a structure that is too deep are damage, too.
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, Mapping):
                    yield cast("Mapping[str, Any]", record)


def curves_of(history: Iterable[Mapping[str, Any]]) -> Curves:
    """Return all curves, in the order of their first record.

    If a step was logged twice, because the run was killed and resumed, the last value is used.
    """
    stages: dict[str, dict[str, dict[int, float]]] = {}
    for record in history:
        stage, step = record.get("stage"), record.get("step")
        if not isinstance(stage, str) or not isinstance(step, int) or abs(step) > LAST_STEP:
            continue
        for key, value in record.items():
            if "/" in key and is_number(value):
                stages.setdefault(stage, {}).setdefault(key, {})[step] = float(value)
    return {
        stage: {key: sorted(values.items()) for key, values in curves.items()}
        for stage, curves in stages.items()
    }
