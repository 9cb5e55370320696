"""Results of a run without times, paths and machines, and their comparison with a record.

`MEGAKD_GOLDEN=write` writes the records anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

RECORDS = Path(__file__).parents[1] / "golden" / "records"
WRITES = os.environ.get("MEGAKD_GOLDEN") == "write"
# Rounding of another processor grows over the steps of a run: by 5e-4 in 40 steps of a selector.
RELATIVE, ABSOLUTE = 1e-3, 5e-4
# A policy gradient grows it faster: the student then learns from other answers.
OF_CASE = {"knowledge_selection": 3e-2}
# Keys that tell the time, the machine or the place of a run.
TIMES = ("seconds", "latency", "environment", "versions", "tokens_per_second", "peak_memory_bytes")
OF_STEPS = ("fits_in", "ms", "bytes", "teacher_share", "time", "low", "high", "overhead")
# Warnings and measured sizes tell numbers as text, which are not compared as numbers; the meanings
# of stages are for readers.
VARIES = (*TIMES, *OF_STEPS, "warnings", "measured", "meaning")


def learned(out: Path) -> dict[str, list[list[float]]]:
    """Return [step, loss, gradient norm] of every logged step of every stage."""
    steps: dict[str, list[list[float]]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "train/loss" in record:
            values = [record["train/loss"], record.get("train/gradient_norm", 0.0)]
            steps.setdefault(record["stage"], []).append([record["step"], *values])
    return steps


def reported(out: Path) -> dict[str, Any]:
    """Return report.json without what varies."""
    return _steady(json.loads((out / "report.json").read_text()))


def resolved(out: Path) -> Any:
    return yaml.safe_load((out / "config.yaml").read_text())


def digest(rows: Any) -> str:
    """Return a digest of encoded rows: names and values of all columns, in order."""
    result = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            value = row[name]
            value = value.tolist() if hasattr(value, "tolist") else value
            result.update(json.dumps([name, value]).encode())
    return result.hexdigest()[:16]


def _steady(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _steady(inner) for name, inner in value.items() if not _varies(name)}
    return [_steady(inner) for inner in value] if isinstance(value, list) else value


def _varies(name: str) -> bool:
    is_time = name.endswith("_seconds") or re.search(r"\.(ms|speedup)_batch_", name) is not None
    return is_time or not {*VARIES}.isdisjoint(name.split("."))


def check_recorded(name: str, values: Any, *, folder: Path | None = None) -> None:
    """Compare values with the record of this name; write the record if asked to.

    The path of `folder` is left out of texts.

    Raises:
        AssertionError: a value differs; the message names the first ten by their keys.
    """
    path = RECORDS / f"{name}.json"
    now = json.loads(json.dumps(values).replace(str(folder), "FOLDER"))
    if WRITES:
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(now, indent=1, sort_keys=True)
        # A list of numbers, such as those of a step, is one line of the record.
        text = re.sub(r"\[[^\[\]{}\"]*\]", lambda plain: " ".join(plain[0].split()), text)
        path.write_text(text + "\n")
    recorded = json.loads(path.read_text())
    relative = OF_CASE.get(name, RELATIVE)
    different = list(_different("", recorded, now, relative))
    assert not different, f"{name} differs from its record:\n" + "\n".join(different[:10])


def _different(where: str, recorded: Any, now: Any, relative: float) -> Iterator[str]:
    if isinstance(recorded, dict) and isinstance(now, dict):
        for key in sorted(recorded.keys() | now.keys()):
            inner = f"{where}.{key}" if where else key
            if key not in recorded or key not in now:
                yield f"{inner}: only in the {'record' if key in recorded else 'run'}"
            else:
                yield from _different(inner, recorded[key], now[key], relative)
    elif isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        for number, pair in enumerate(zip(recorded, now, strict=True)):
            yield from _different(f"{where}[{number}]", *pair, relative)
    elif not _same(recorded, now, relative):
        yield f"{where}: {recorded!r} in the record, {now!r} in the run"


def _same(recorded: Any, now: Any, relative: float) -> bool:
    if isinstance(recorded, float) and isinstance(now, float | int):
        return math.isclose(recorded, now, rel_tol=relative, abs_tol=ABSOLUTE)
    return recorded == now
