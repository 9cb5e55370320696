"""The content of metrics.jsonl as curves, one per stage and number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from megakd.reports.table import is_number

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
            with suppress(ValueError, RecursionError):
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
