"""report.json: written at the end of a run, and read back with a check of its structure."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    NotRequired,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from megakd.config.error_text import shown
from megakd.contract.results import Report
from megakd.errors import CheckpointError
from megakd.reports.history import LARGEST
from megakd.storage import atomic

if TYPE_CHECKING:
    import torch

LIBRARIES = ("megakd", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy")
LATER_KEYS: Mapping[str, Any] = {
    **dict.fromkeys(("assistants", "latency", "teachers", "samples", "pruning"), ()),
    **dict.fromkeys(("generation", "warnings", "sizes"), ()),
    **dict.fromkeys(("cost", "pool", "vocabulary")),
    **{key: {} for key in ("evaluation_sets", "seconds")},
}
"""Keys that reports of earlier versions do not have, with their empty values."""
_NEVER_NULL = frozenset(
    {"seconds", "alternative_seconds", "sparsity", "weight", "precision", "recall", "f1"}
)
"""Numbers that are always finite; the others are null if they were NaN."""
_FORMS: Mapping[Any, tuple[type, str]] = {
    str: (str, "text"),
    bool: (bool, "true or false"),
    Sequence: (list, "a list"),
    Mapping: (dict, "a mapping"),
}


def write_report(path: Path, report: Report) -> None:
    """Write report.json, whole or not at all."""
    atomic.write_json(path, report)


def completed(report: Report) -> Report:
    """Return a report of any version with all keys."""
    return cast("Report", {**LATER_KEYS, **report})


def installed_versions() -> dict[str, str]:
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

    return {
        "versions": installed_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "corpus_content_hash": corpus_content_hash,
    }


def read_report(path: Path) -> Report:
    """Read report.json."""
    again = f"remove {path} and start the command of the run again, which reuses finished stages"
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: megakd writes the file when the run is complete; start the "
            "command of the run again to continue the run"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}); {again}") from error
    present = set(cast("dict[str, Any]", content)) if isinstance(content, dict) else set[str]()
    missing = sorted(Report.__required_keys__ - LATER_KEYS.keys() - present)
    if missing:
        raise CheckpointError(
            f"{path} is not a report of megakd: {', '.join(missing)} missing; {again}"
        )
    for problem in _problems(content, Report):
        raise CheckpointError(f"{path} is damaged: {problem}; {again}")
    return cast("Report", content)


def _problems(value: Any, kind: Any, where: str = "", *, may_be_null: bool = True) -> Iterator[str]:
    origin = get_origin(kind) or kind
    if origin in (Union, types.UnionType):
        if value is not None:
            yield from _problems(value, get_args(kind)[0], where, may_be_null=may_be_null)
        return
    form, name = _FORMS[Mapping] if is_typeddict(kind) else _FORMS.get(origin, (object, ""))
    is_fine = isinstance(value, form)
    if kind in (int, float):
        name = "a finite number"
        is_fine = _is_number(value, may_be_null=may_be_null and kind is float)
    if not is_fine:
        yield f"{where} is {shown(value)}, and must be {name}"
    elif is_typeddict(kind):
        yield from _problems_of_keys(value, kind, where)
    elif form in (dict, list):
        items = value.items() if form is dict else enumerate(value)
        for key, item in items:
            inner = f"{where}.{key}" if form is dict else f"{where}[{key}]"
            yield from _problems(item, get_args(kind)[-1], inner, may_be_null=may_be_null)


def _problems_of_keys(content: Mapping[str, Any], kind: Any, where: str) -> Iterator[str]:
    for key, hint in get_type_hints(kind, include_extras=True).items():
        is_optional = get_origin(hint) is NotRequired
        path = f"{where}.{key}".removeprefix(".")
        if key in content:
            wanted = get_args(hint)[0] if is_optional else hint
            yield from _problems(content[key], wanted, path, may_be_null=key not in _NEVER_NULL)
        elif not is_optional and path not in LATER_KEYS:
            yield f"{path} is missing"


def _is_number(value: object, *, may_be_null: bool) -> bool:
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return value is None and may_be_null
    # A metric that is not finite is left out of tables and charts.
    return abs(value) <= LARGEST or (may_be_null and isinstance(value, float))
