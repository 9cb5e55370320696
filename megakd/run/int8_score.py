"""The score of a student's int8 weights, on the rows that the student is scored on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.engine.collectives import on_main
from megakd.engine.sharding import is_first_rank
from megakd.models.export import weight_bytes
from megakd.models.int8 import INT8, write_int8, write_restored

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megakd.contract.results import QuantizedReport
    from megakd.run.lab import Lab

FOLDER = ".int8"
"""Folder below `output_dir` that exists only during the scoring."""


def score_int8(lab: Lab, student: Path, deepspeed: str | Mapping[str, Any]) -> QuantizedReport:
    """Return the size and the metrics of a student's int8 weights; a collective.

    The weights are restored to fp32 in a temporary folder, and scored as the student is scored.

    Args:
        lab: the lab of the run.
        student: the model folder of the student in full precision.
        deepspeed: see `Lab.score`.

    Raises:
        MegakdError: a weight is not finite, or the disk is full.
    """
    folder = lab.config.output_dir / FOLDER
    restored = folder / "restored"

    def write() -> int:
        write_int8(student, folder / INT8)
        write_restored(folder / INT8, restored)
        return weight_bytes(folder / INT8)

    try:
        size = on_main(write)
        metrics = lab.score(lab.source(restored), deepspeed)["metrics"]
    finally:
        # All ranks have read the folder: scoring ends with a collective.
        if is_first_rank():
            shutil.rmtree(folder, ignore_errors=True)
    return {"bytes": size, "metrics": metrics}
