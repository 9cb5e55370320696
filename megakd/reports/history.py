"""The content of metrics.jsonl as curves, one per stage, number and view."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

LAST_STEP = 2**53
"""A record with a larger step is damaged: an axis could not tell the step from the next."""
LARGEST = 1e300
"""Integers of JSON are unbounded; an axis with larger values cannot be drawn."""

Points = Sequence[tuple[int, float]]


class Curve(NamedTuple):
    """One number over the steps of a stage.

    points: (step, value) with rising steps and finite values.
    not_finite: number of logged values that are left out because they were NaN or infinite.
    """

    points: Points
    not_finite: int = 0


Panels = dict[str, dict[str, Curve]]
"""Curves by the name of a number and by view; the curve of the model itself has the view ""."""


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


def panels(history: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Panels]]:
    """Return all curves by stage and group (`train`, `eval`), in the order of their first record.

    If a step was logged twice, because the run was killed and resumed, the last value is used.
    """
    stages: dict[str, dict[str, dict[int, float | None]]] = {}
    for record in history:
        stage, step = record.get("stage"), record.get("step")
        if not isinstance(stage, str) or not isinstance(step, int) or abs(step) > LAST_STEP:
            continue
        curves = stages.setdefault(stage, {})
        for key, value in record.items():
            if "/" in key and (value is None or isinstance(value, int | float)):
                curves.setdefault(key, {})[step] = value
    return {stage: _grouped(curves) for stage, curves in stages.items()}


def _grouped(curves: Mapping[str, Mapping[int, float | None]]) -> dict[str, Panels]:
    groups: dict[str, Panels] = {}
    for key, values in curves.items():
        group, _, rest = key.partition("/")
        view, _, name = rest.rpartition("/")
        finite = [(s, float(v)) for s, v in values.items() if v is not None and abs(v) <= LARGEST]
        curve = Curve(tuple(sorted(finite)), len(values) - len(finite))
        groups.setdefault(group, {}).setdefault(name, {})[view] = curve
    return {
        group: {name: dict(sorted(views.items(), key=_in_order)) for name, views in named.items()}
        for group, named in groups.items()
    }


def _in_order(view: tuple[str, Curve]) -> list[float | str]:
    pieces = re.split(r"(\d+(?:\.\d+)?)", view[0])
    return [float(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def thinned(points: Points, limit: int) -> Points:
    """Return at most `limit` points (at least 4): both ends, and the extremes of each stretch."""
    if len(points) <= limit:
        return points
    inner, stretches = points[1:-1], max(1, (limit - 2) // 2)
    drawn = [points[0]]
    for number in range(stretches):
        first, end = (n * len(inner) // stretches for n in (number, number + 1))
        drawn += sorted({pick(inner[first:end], key=lambda p: p[1]) for pick in (min, max)})
    return (*drawn, points[-1])


def evenly(items: Sequence[Any], limit: int) -> list[Any]:
    """Return at most `limit` of the items (at least 2), evenly spaced, with both ends."""
    if len(items) <= limit:
        return list(items)
    return [items[index * (len(items) - 1) // (limit - 1)] for index in range(limit)]
