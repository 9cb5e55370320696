"""The record of a run, the names in its folder, and its comparison with another."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from megakd.errors import (
    CheckpointError,
    suggestion,
)

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


Fingerprint = dict[str, Any]

_ABSENT = object()

_MOST_SHOWN = 5

_BLOCK = 1 << 16

_STRIDE = 1 << 20

_READ_WHOLE = 1 << 28


def flatten(tree: Any, prefix: str = "") -> Fingerprint:
    """Return a nested tree as a flat mapping with dotted keys; list items get their position."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: Fingerprint = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return `key: 3 there, 4 here; …` for the fields that differ, or an empty string."""
    shown = [
        f"{key}: {_shown(there, key)} there, {_shown(here, key)} here"
        for key in dict.fromkeys([*there, *here])
        if there.get(key, _ABSENT) != here.get(key, _ABSENT)
    ]
    if len(shown) > _MOST_SHOWN:
        shown = [*shown[:_MOST_SHOWN], f"and {len(shown) - _MOST_SHOWN} more"]
    return "; ".join(shown)


def _shown(fields: Mapping[str, Any], key: str) -> str:
    return repr(fields[key]) if key in fields else "absent"


def files_identity(files: Iterable[Path]) -> str:
    """Return a hash of the names, sizes and contents of files; large files are sampled.

    Of a file above 256 MiB, 64 KiB of every MiB and the last 64 KiB are read. This is fast for
    models of any size and samples every large matrix, also in the middle of the file: if only some
    layers were trained further, the beginning and the end of the file are unchanged.
    """
    digest = hashlib.sha256()
    for path in files:
        facts = path.stat()
        version = facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns
        digest.update(f"{path.name}:{facts.st_size}:".encode())
        digest.update(_content(path, facts.st_size, version))
    return digest.hexdigest()


@functools.cache
def _content(path: Path, size: int, written: tuple[int, ...]) -> bytes:
    del written  # part of the cache key: a rewritten file is read again
    digest, step = hashlib.sha256(), _BLOCK if size <= _READ_WHOLE else _STRIDE
    with path.open("rb") as file:
        for start in (*range(0, size, step), max(0, size - _BLOCK)):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.digest()
