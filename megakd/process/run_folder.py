"""The folder of a run: the names of its files, its record, and the models in it.

It is read without torch, so that a command that names something else ends at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

from megakd.errors import CheckpointError, suggestion

CONFIG, RUN, REPORT = "config.yaml", "run.json", "report.json"
FINAL, RESULT = "final", "result.json"
FORMAT = 7
"""Increased when records or checkpoints change, so that older ones are refused in one line."""


def read_record(out: Path) -> dict[str, Any] | None:
    """Return the content of run.json; None if the folder holds no run.

    Raises:
        CheckpointError: the run is of another version, or the file is damaged.
    """
    path = out / RUN
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] == FORMAT and record["facts"]:
                return record
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error!r}); restore it, or start over with rm -r "
                f"{quote(str(out))}"
            ) from error
    elif not any(f for of in (f"stages/*/{RESULT}", "checkpoints/*/step-*") for f in out.glob(of)):
        return None
    raise CheckpointError(
        f"{out} holds a run of another version of megakd, which this version cannot go on with; "
        f"use another output_dir, start over with rm -r {quote(str(out))}, or use that version"
    )


def exported_stage(out: Path, stage: str | None) -> Path:
    """Return the folder of a finished stage; None: of the one that became `final/`.

    Raises:
        CheckpointError: there is no such stage, or it has no model.
    """
    stages = out / "stages"
    # Others, such as a scoring, give only scores.
    finished = (path.parent for path in stages.glob(f"*/{RESULT}"))
    models = sorted(folder.name for folder in finished if (folder / "config.json").is_file())
    listed = f"finished stages: {', '.join(models) or 'none'}"
    record = read_record(out) if (out / REPORT).is_file() else None
    name = stage or (record or {}).get("student")
    if name is None:
        raise CheckpointError(
            f"{out} holds no finished run to export; finish the run, or give --stage NAME; {listed}"
        )
    if name not in models:
        near = suggestion(name, (folder.name for folder in stages.glob("*/"))) or ";"
        reason = f'{out} has no stage "{name}"{near}'
        if (stages / name).is_dir():
            has_result = (stages / name / RESULT).is_file()
            problem = "gives no model" if has_result else "has not finished"
            reason = f"stage {name!r} of {out} {problem};"
        raise CheckpointError(f"{reason} {listed}")
    return stages / name
