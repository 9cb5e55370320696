"""Numbers of the evidence that are read from the report and the log of a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def selected(output: Path) -> dict[str, float]:
    """Return the mean weight of each kind of knowledge over the student's steps.

    Empty if no kinds were selected.

    Args:
        output: folder of the run.
    """
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    logged: dict[str, list[float]] = {}
    for key, value in (item for r in records if r["stage"] == "student" for item in r.items()):
        if key.startswith("select/"):
            logged.setdefault(key.removeprefix("select/"), []).append(value)
    return {kind: sum(values) / len(values) for kind, values in logged.items()}


CHOSEN, _SCORE = "chosen", "trial score "


def first_trial(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of MiniDisc's first trial and the sparsity that was chosen, as details.

    Empty for other methods.
    """
    rows = [row for row in report["candidates"] if row.get("iteration") == 1]
    scores = {f"{_SCORE}{row['sparsity']:g}": row["metric"] for row in rows}
    chosen = [row["sparsity"] for row in rows if row["chosen"]]
    return scores | ({CHOSEN: chosen[0]} if chosen else {})


def trial_scores(details: Mapping[str, float]) -> dict[float, float]:
    """Return the scores of a first trial by sparsity, from the details of a cell."""
    return {
        float(key.removeprefix(_SCORE)): value
        for key, value in details.items()
        if key.startswith(_SCORE)
    }


def teacher_steps(report: Mapping[str, Any]) -> int:
    """Return the steps in which a teacher answered, counted once per teacher.

    The steps of pilots and selectors are included.
    """
    steps = sum(stage["steps"] for stage in report["stages"])
    if report["pool"] is None:
        return steps
    students = sum(stage["steps"] for stage in report["stages"] if stage["name"] == "student")
    return steps - students + sum(one["steps"] for one in report["pool"]["teachers"])
