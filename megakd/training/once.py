"""Stages that are not trained: a measurement, or a model that is built, once per run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megakd.contract.stage import StageResult, untrained
from megakd.errors import CheckpointError
from megakd.storage.fingerprint import Fingerprint, flatten
from megakd.training.assembly import Assembly
from megakd.training.stage_folder import read_result, write_result


def once(
    assembly: Assembly,
    name: str,
    facts: Mapping[str, Any],
    make: Callable[[Path, Fingerprint], None],
) -> StageResult:
    """Return the result of an untrained stage; make its folder if it does not exist; a collective.

    Args:
        facts: what the result depends on, in addition to the conditions of the run.
        make: writes the folder with a result of the given fingerprint.
    """
    folder = assembly.stage_folder(name)
    fingerprint = flatten({**assembly.conditions, **facts})
    result = read_result(folder, fingerprint)
    if result is None:
        make(folder, fingerprint)
        result = read_result(folder, fingerprint)
    if result is None:
        raise CheckpointError(f"{folder} was removed while megakd wrote it; start the run again")
    return result


def measured_once(
    assembly: Assembly,
    name: str,
    facts: Mapping[str, Any],
    measure: Callable[[], Mapping[str, float]],
) -> StageResult:
    """Return the result of a measurement, see `once`; `measure` returns the metrics."""

    def make(folder: Path, fingerprint: Fingerprint) -> None:
        began = time.perf_counter()
        metrics = measure()
        result = untrained(name, folder, time.perf_counter() - began)
        write_result(dataclasses.replace(result, metrics=metrics), fingerprint)

    return once(assembly, name, facts, make)
